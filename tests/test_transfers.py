"""Every command with repositories in place of files, in every way in which large files move."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import Result
from conftest import FIXTURES, in_every_way
from hub_faults import MovedParent
from hub_server import Hub, client_environment

from converter.catalog import find

Command = Callable[..., Result]

SHAPES = FIXTURES / "shapes_panoptic_128"
DELTA, BACKBONE, MODEL = "tue-mps/delta", "facebook/backbone", "me/model"
CONVERT = ("--checkpoint", "shapes_panoptic_128", "--delta", DELTA, "--backbone", BACKBONE)

# A client that was told not to use Xet follows a redirect for each of two large files.
REQUESTS = {"xet": 8, "xet-unshared": 8, "xet-off": 10, "lfs": 8}


@pytest.fixture
def sources(hub: Hub) -> None:
    """Delta and backbone in repositories of three files."""
    hub.create_repo(DELTA, {"pytorch_model.bin": SHAPES / "delta" / "pytorch_model.bin"})
    backbone = {name: SHAPES / "backbone" / name for name in ("config.json", "model.safetensors")}
    hub.create_repo(BACKBONE, backbone)


def damage(path: Path) -> None:
    """Changes a value in the middle of a file in the cache."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.resolve().chmod(0o644)  # files of the store that repositories share are read-only
    path.write_bytes(content)


@in_every_way
def test_a_conversion_asks_the_hub_for_little(
    command: Command, hub: Hub, sources: None, transfer: str
) -> None:
    fresh = command(*CONVERT, "--output", "fresh", "--no-verify")
    assert fresh.exit_code == 0, fresh.output
    assert len(hub.requests) <= REQUESTS[transfer], hub.request_lines
    hub.requests.clear()

    again = command(*CONVERT, "--output", "again", "--no-verify")
    assert again.exit_code == 0, again.output
    assert hub.request_lines == [
        f"GET /api/models/{repo_id}/revision/main" for repo_id in (DELTA, BACKBONE)
    ]
    hub.requests.clear()

    offline = command(*CONVERT, "--output", "offline", "--no-verify", "--offline")
    assert offline.exit_code == 0, offline.output
    assert hub.requests == []
    models = {
        Path(name, "model.safetensors").read_bytes() for name in ("fresh", "again", "offline")
    }
    assert len(models) == 1
    histories = {Path(name, "conversion.json").read_text() for name in ("fresh", "offline")}
    assert len(histories) == 1
    checks = [check["check"] for check in json.loads(histories.pop())["pair"]]
    assert checks.count("hub-digest") == 2


@in_every_way
def test_every_command_takes_repositories(
    command: Command, hub: Hub, me: str, sources: None
) -> None:
    def run(*arguments: str | Path) -> str:
        result = command(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "verdict   passed" in run(*CONVERT, "--output", "model")
    assert "weights     delta" in run("inspect", DELTA)
    assert "read back: 6 files" in run("push", "model", MODEL, "--verify-remote")
    assert "keep  model.safetensors" in run("push", "model", MODEL, "--dry-run")
    assert "arithmetic passed" in run("verify", MODEL)
    assert "arithmetic passed" in run("verify", MODEL, "--delta", DELTA, "--backbone", BACKBONE)
    assert "circle" in run("segment", MODEL, SHAPES / "images" / "3.png")
    arguments = ("--dataset", "coco-panoptic", "--data", SHAPES / "val", "--limit", "2")
    assert "PQ" in run("evaluate", MODEL, *arguments)
    assert "recorded" in run("record", MODEL, "--random", "1", "--output", "recording")
    released = run("release", "--namespace", "me", "--checkpoint", "tiny_panoptic_48x80")
    assert f"me/{'eomt-dinov3-' + find('tiny_panoptic_48x80').slug}" in released


@in_every_way
def test_a_model_that_is_damaged_in_the_cache_is_not_taken_for_a_wrong_one(
    command: Command, hub: Hub, converted: Callable[[str], Path]
) -> None:
    model = converted("tiny_panoptic_64")
    hub.create_repo(MODEL, {path.name: path for path in model.iterdir()})
    assert command("verify", MODEL, "--level", "1").exit_code == 0
    cached = Path(huggingface_hub.hf_hub_download(MODEL, "model.safetensors"))
    damage(cached)

    offline = command("verify", MODEL, "--offline")
    assert offline.exit_code == 1
    assert f"model.safetensors of {MODEL} is damaged in the cache" in offline.stderr
    online = command("verify", MODEL)
    assert online.exit_code == 0, online.output
    assert "verdict   passed" in online.stdout
    assert cached.read_bytes() == (model / "model.safetensors").read_bytes()


def test_offline_a_partly_cached_model_is_reported_as_incomplete(
    command: Command, hub: Hub, converted: Callable[[str], Path]
) -> None:
    model = converted("tiny_panoptic_64")
    hub.create_repo(MODEL, {path.name: path for path in model.iterdir()})
    huggingface_hub.hf_hub_download(MODEL, "config.json")

    result = command("verify", MODEL, "--offline")
    assert result.exit_code == 4
    assert "is not in the cache: preprocessor_config.json is missing" in result.stderr


@in_every_way
def test_a_source_that_is_damaged_in_the_cache_proves_nothing(
    command: Command, hub: Hub, sources: None
) -> None:
    command(*CONVERT, "--output", "model", "--no-verify")
    damage(Path(huggingface_hub.hf_hub_download(DELTA, "pytorch_model.bin")))

    result = command("verify", "model", "--level", "2", "--json")
    arithmetic = json.loads(result.stdout)["levels"][1]
    assert arithmetic["status"] == "passed"  # against the digests of conversion.json
    assert json.loads(result.stdout)["verdict"] == "unverified"


@in_every_way
def test_a_configuration_that_is_damaged_in_the_cache_is_not_converted(
    command: Command, hub: Hub, sources: None
) -> None:
    """The damaged value does not contradict any shape of the weights."""
    assert command(*CONVERT, "--output", "first", "--no-verify").exit_code == 0
    path = Path(huggingface_hub.hf_hub_download(BACKBONE, "config.json"))
    right = path.read_bytes()
    path.write_bytes(right.replace(b'"rope_theta": 100', b'"rope_theta": 900'))
    assert path.read_bytes() != right

    offline = command(*CONVERT, "--output", "second", "--no-verify", "--offline")
    assert offline.exit_code == 1
    assert f"config.json of {BACKBONE} is damaged in the cache" in offline.stderr
    online = command(*CONVERT, "--output", "second", "--no-verify")
    assert online.exit_code == 0, online.output
    assert path.read_bytes() == right


@pytest.mark.parametrize("in_lfs", [True, False])
def test_files_are_checked_by_whatever_digest_the_hub_gives(
    command: Command, hub: Hub, monkeypatch: pytest.MonkeyPatch, in_lfs: bool
) -> None:
    """Some repositories keep all files in LFS, or small weights outside of it."""
    monkeypatch.setattr("hub_repos.belongs_in_lfs", lambda *_: in_lfs)
    hub.create_repo(DELTA, {"pytorch_model.bin": SHAPES / "delta" / "pytorch_model.bin"})
    backbone = {name: SHAPES / "backbone" / name for name in ("config.json", "model.safetensors")}
    hub.create_repo(BACKBONE, backbone)
    first = command(*CONVERT, "--output", "first", "--no-verify", "--json")
    assert first.exit_code == 0, first.output
    checks = [check for check in json.loads(first.stdout)["pair"] if check["check"] == "hub-digest"]
    assert [check["status"] for check in checks] == ["passed", "passed"]

    for repo_id, name in (
        (BACKBONE, "config.json"),
        (BACKBONE, "model.safetensors"),
        (DELTA, "pytorch_model.bin"),
    ):
        cached = Path(huggingface_hub.hf_hub_download(repo_id, name))
        damage(cached)
        offline = command(*CONVERT, "--output", "new", "--no-verify", "--force", "--offline")
        assert offline.exit_code == 1
        assert f"{name} of {repo_id} is damaged in the cache" in offline.stderr
        online = command(*CONVERT, "--output", "new", "--no-verify", "--force")
        assert online.exit_code == 0, online.output


def test_weights_that_are_damaged_while_the_branch_moves_are_fetched_once_more(
    command: Command, hub: Hub, sources: None
) -> None:
    assert command(*CONVERT, "--output", "first", "--no-verify").exit_code == 0
    damage(Path(huggingface_hub.hf_hub_download(DELTA, "pytorch_model.bin")))
    hub.break_request(MovedParent(), method="GET", path=f"/api/models/{BACKBONE}/")
    hub.commit(DELTA, {"README.md": b"newer"})
    hub.break_request(MovedParent(), method="HEAD", path=f"/{DELTA}/resolve/main")

    result = command(*CONVERT, "--output", "second", "--no-verify")
    assert result.exit_code == 0, result.output
    assert hub.broken


@in_every_way
def test_a_damaged_cached_file_is_replaced_before_it_is_inspected(
    command: Command, hub: Hub, sources: None
) -> None:
    assert command("inspect", DELTA).exit_code == 0
    cached = Path(huggingface_hub.hf_hub_download(DELTA, "pytorch_model.bin"))
    damage(cached)

    assert command("inspect", DELTA).exit_code == 0
    assert cached.read_bytes() == (SHAPES / "delta" / "pytorch_model.bin").read_bytes()


@in_every_way
def test_a_process_with_the_clients_own_settings_converts(
    hub: Hub, sources: None, tmp_path: Path
) -> None:
    """The settings of this process's client are replaced; those of a child come from outside."""
    program = [sys.executable, "-c", "from converter.cli import main; main()"]
    printed = subprocess.run(
        [*program, *CONVERT, "--output", tmp_path / "model", "--no-verify", "--json"],
        env=client_environment(hub, tmp_path / "child"),
        capture_output=True,
        check=True,
    ).stdout

    checks = [check["check"] for check in json.loads(printed)["pair"]]
    assert checks.count("hub-digest") == 2
