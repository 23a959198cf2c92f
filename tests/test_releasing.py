"""A release of several checkpoints: it can be continued, reports everything, survives failures."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from conftest import FIXTURES, HANGS, over_xet
from hub_faults import Status
from hub_server import Hub, client_environment

import converter
from converter.catalog import CATALOG, find
from converter.errors import AccessError, OutputError, UnreadableFileError, UsageError
from converter.hub.access import Access

Command = Callable[..., Result]
NAMES = ("tiny_panoptic_64", "tiny_semantic_48", "tiny_panoptic_48x80")
REPOS = [
    "me/eomt-dinov3-tiny-panoptic-48x80",
    "me/eomt-dinov3-tiny-panoptic-64",
    "me/eomt-dinov3-tiny-semantic-48",
]


@pytest.fixture
def output(me: str, tmp_path: Path) -> Path:
    """The output folder of a release; a user is logged in."""
    return tmp_path / "release"


def journal(output: Path) -> dict[str, dict[str, str]]:
    content = json.loads((output / "release.json").read_text())
    return {step["checkpoint"]: step for step in content["checkpoints"]}


def release(output: Path, *names: str, **options: object) -> converter.Release:
    return converter.release(names or NAMES, namespace="me", output=output, **options)  # type: ignore[arg-type]


def test_every_checkpoint_is_converted_verified_and_pushed(hub: Hub, output: Path) -> None:
    released = release(output)

    assert hub.repo_ids == REPOS
    assert not released.failed
    for step in released.steps:
        assert (step.status, step.verdict) == ("published", "passed")
        assert step.commit == hub.commits(step.repo_id)[0].sha
        assert (output / step.checkpoint / "conversion.json").is_file()
    assert {name: step["commit"] for name, step in journal(output).items()} == {
        step.checkpoint: step.commit for step in released.steps
    }


def test_one_that_fails_does_not_stop_the_rest(hub: Hub, output: Path) -> None:
    hub.break_request(Status(500), path="tiny-semantic-48", times=None)
    released = release(output)

    statuses = {step.checkpoint: step.status for step in released.steps}
    assert statuses == {
        "tiny_panoptic_64": "published",
        "tiny_semantic_48": "failed",
        "tiny_panoptic_48x80": "published",
    }
    assert released.failed
    assert "status 500" in journal(output)["tiny_semantic_48"]["error"]


@pytest.mark.smoke  # for hf_xet: before 1.7.1 it repeats the first refusal forever
@over_xet
def test_one_upload_that_is_refused_does_not_stop_the_rest(hub: Hub, output: Path) -> None:
    hub.break_request(Status(403), path="tiny-panoptic-64/xet-write-token")
    released = release(output)

    statuses = {step.checkpoint: step.status for step in released.steps}
    assert statuses == {
        "tiny_panoptic_64": "failed",
        "tiny_semantic_48": "published",
        "tiny_panoptic_48x80": "published",
    }


def test_a_rerun_does_only_what_is_left(hub: Hub, output: Path) -> None:
    hub.break_request(Status(500), path="tiny-semantic-48", times=None)
    release(output)
    hub.mend()
    hub.requests.clear()
    announced: list[str] = []
    released = release(output, announce=announced.append)

    assert not released.failed
    assert all("tiny_semantic_48" in line for line in announced)
    assert not [line for line in hub.request_lines if "panoptic" in line]
    assert journal(output)["tiny_semantic_48"]["error"] is None


def test_what_was_converted_is_not_converted_again(hub: Hub, output: Path) -> None:
    hub.break_request(Status(500), method="POST", path="/commit/", times=None)
    release(output, NAMES[0])
    hub.mend()
    weights = output / NAMES[0] / "model.safetensors"
    before = weights.stat().st_ino
    release(output, NAMES[0])

    assert weights.stat().st_ino == before


def test_what_was_changed_since_is_named_and_converted_again_once_it_was_moved_away(
    hub: Hub, output: Path
) -> None:
    hub.break_request(Status(500), method="POST", path="/commit/", times=None)
    release(output, NAMES[0])
    hub.mend()
    weights = output / NAMES[0] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    assert release(output, NAMES[0]).failed
    assert "(model.safetensors)" in str(release(output, NAMES[0]).steps[0].error)
    weights.rename(output.parent / "changed.safetensors")
    assert not release(output, NAMES[0]).failed


def test_force_starts_over(hub: Hub, output: Path) -> None:
    release(output, NAMES[0])
    announced: list[str] = []
    release(output, NAMES[0], force=True, announce=announced.append)

    assert len(announced) == 2
    assert len(hub.commits(REPOS[1])) == 2


def test_more_checkpoints_join_a_release(hub: Hub, output: Path) -> None:
    release(output, NAMES[0])
    release(output, NAMES[1])

    assert set(journal(output)) == set(NAMES[:2])


def test_other_options_in_the_same_folder_are_refused(hub: Hub, output: Path) -> None:
    release(output, NAMES[0])

    with pytest.raises(UsageError, match="release with a different dtype"):
        release(output, NAMES[0], dtype="bfloat16")


def test_an_empty_release_json_is_refused(hub: Hub, output: Path) -> None:
    output.mkdir()
    (output / "release.json").write_text("{}")

    with pytest.raises(UnreadableFileError, match="not the record of a release"):
        release(output)


def test_a_dry_run_lists_what_is_left_without_any_request(hub: Hub, output: Path) -> None:
    release(output, NAMES[0])
    hub.requests.clear()
    planned = release(output, dry_run=True)

    assert [step.status for step in planned.steps] == ["published", "waiting", "waiting"]
    assert hub.requests == []


def test_nothing_is_converted_without_a_login(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="Nobody is logged in"):
        release(tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_names_follow_the_template(hub: Hub, output: Path) -> None:
    release(output, NAMES[0], name_template="{name}-x")

    assert hub.repo_ids == ["me/tiny_panoptic_64-x"]


@pytest.mark.parametrize("template", ["model", "{size}", "{", "{0}"])
def test_a_template_that_gives_no_names_is_refused(output: Path, template: str) -> None:
    with pytest.raises(UsageError, match=r"is not a template|one name"):
        release(output, name_template=template)


def test_published_models_have_the_names_that_they_are_published_under() -> None:
    assert find("coco_panoptic_large_640").slug == "coco-panoptic-large-640"
    assert find("ade20k_semantic_large_512").slug == "ade-semantic-large-512"
    assert len({entry.slug for entry in CATALOG}) == len(CATALOG)


def test_by_default_all_published_checkpoints_are_released(output: Path) -> None:
    planned = converter.release(namespace="me", output=output, dry_run=True)

    assert [step.checkpoint for step in planned.steps] == [
        entry.name for entry in CATALOG if not entry.offline
    ]


def test_a_shared_backbone_is_fetched_once(
    hub: Hub, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two published checkpoints on the same backbone, which fail later: they have tiny weights."""

    def no_picture(_access: Access) -> Path:
        raise AccessError("There is no network.")

    monkeypatch.setattr("converter.checks.published.recorded_picture", no_picture)
    source = FIXTURES / "tiny_panoptic_64"
    backbone = {path.name: path for path in (source / "backbone").iterdir()}
    hub.create_repo(
        "facebook/dinov3-vitl16-pretrain-lvd1689m", {**backbone, "LICENSE.md": b"DINOv3 License\n"}
    )
    names = ("coco_panoptic_large_640", "coco_panoptic_large_1280")
    for name in names:
        hub.create_repo(find(name).delta, {"pytorch_model.bin": source / "delta/pytorch_model.bin"})
    hub.served.clear()
    release(output, *names)

    assert hub.served.count("facebook/dinov3-vitl16-pretrain-lvd1689m/model.safetensors") == 1
    asked = "GET /api/models/facebook/dinov3-vitl16-pretrain-lvd1689m/revision/main"
    assert hub.request_lines.count(asked) == 1


def test_the_user_is_looked_up_once_for_all_checkpoints(hub: Hub, output: Path) -> None:
    release(output, *NAMES)

    assert hub.request_lines.count("GET /api/whoami-v2") == 1


def test_the_licence_is_looked_for_before_anything_is_converted(hub: Hub, output: Path) -> None:
    name = "coco_panoptic_small_640"
    hub.create_repo(find(name).backbone, {"config.json": b"{}", "model.safetensors": b""})
    hub.create_repo(find(name).delta, {"pytorch_model.bin": b""})
    released = release(output, name)

    assert "has no copy of it" in str(released.steps[0].error)
    assert not any("pytorch_model.bin" in request.path for request in hub.requests)


# the command -----------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_notes(
    command: Command, hub: Hub, output: Path
) -> None:
    result = command("release", "--checkpoint", NAMES[0], "--namespace", "me", "--output", output)

    assert result.exit_code == 0, result.output
    commit = hub.commits(REPOS[1])[0].sha
    assert f"published  passed   original  {commit[:12]}" in result.stdout
    assert "1 of 1: converting tiny_panoptic_64" in result.stderr
    notes = (output / "release.md").read_text()
    assert f"[{REPOS[1]}](" in notes
    assert commit[:12] in notes


def test_an_output_that_is_a_file_is_refused(hub: Hub, output: Path) -> None:
    output.write_text("")

    with pytest.raises(OutputError, match="cannot be written"):
        release(output)


@pytest.mark.parametrize("name", ["release.json", "release.md"])
def test_files_of_others_are_not_taken_for_those_of_a_release(
    hub: Hub, output: Path, name: str
) -> None:
    output.mkdir()
    (output / name).write_text("{}")

    with pytest.raises(OutputError, match=rf"{name} exists, and was not written by a release"):
        release(output, NAMES[0], force=True)

    assert [path.read_text() for path in output.iterdir()] == ["{}"]


@over_xet
def test_planted_links_are_not_followed(hub: Hub, output: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    release(output, NAMES[0])
    (output / ".release.json").symlink_to(victim)
    (output / "release.md").unlink()
    (output / "release.md").symlink_to(victim)

    release(output, NAMES[0], force=True)

    assert victim.read_text() == "precious"
    assert not (output / "release.md").is_symlink()


def test_files_that_others_put_into_a_converted_folder_are_kept(hub: Hub, output: Path) -> None:
    release(output, NAMES[0])
    (output / NAMES[0] / "notes.txt").write_text("precious")

    released = release(output, NAMES[0], force=True)

    assert "did not make (notes.txt)" in (released.steps[0].error or "")
    assert (output / NAMES[0] / "notes.txt").read_text() == "precious"


def test_the_command_ends_in_1_if_any_failed(command: Command, hub: Hub, output: Path) -> None:
    hub.break_request(Status(503), path="tiny-semantic-48", times=None)
    arguments = ("release", "--namespace", "me", "--output", output)
    result = command(*arguments, "--checkpoint", NAMES[0], "--checkpoint", NAMES[1])

    assert result.exit_code == 1
    assert f"tiny_semantic_48: {hub.address} is down: status 503" in result.stdout
    content = json.loads(
        command(*arguments, "--dry-run", "--checkpoint", NAMES[1], "--json").stdout
    )
    assert content["checkpoints"][0]["status"] == "failed"


@pytest.mark.parametrize(
    ("transfer", "number"), [("xet", signal.SIGKILL), ("lfs", signal.SIGHUP)], indirect=["transfer"]
)
def test_a_release_continues_after_a_kill(
    hub: Hub, output: Path, me: str, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", "from converter.cli import main; main()", "release"]
    command += ["--namespace", "me", "--output", str(output)]
    command += [word for name in NAMES for word in ("--checkpoint", name)]
    environment = client_environment(hub, tmp_path / "home", token=me)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + HANGS
    while REPOS[1] not in hub.repo_ids and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=HANGS)
    assert hub.repo_ids == [REPOS[1]], said.decode()

    finished = subprocess.run(
        command, env=environment, capture_output=True, timeout=HANGS, check=False, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert hub.repo_ids == REPOS
    for repo in REPOS:
        assert len(hub.commits(repo)) == 2
    assert me not in finished.stdout + finished.stderr
    assert me not in (output / "release.json").read_text()


def test_an_error_and_its_remedy_are_separate_lines(
    command: Command, hub: Hub, me: str, output: Path
) -> None:
    hub.break_request(Status(401), path="/api/repos/create", times=None)
    result = command("release", "--checkpoint", NAMES[0], "--namespace", "me", "--output", output)

    assert result.exit_code == 1
    for printed in (result.stdout, result.stderr):
        assert "\n  Make a new one at https://huggingface.co/settings/tokens, then" in printed
        assert "\\n" not in printed


def test_a_malformed_release_json_is_refused(me: str, output: Path) -> None:
    release(output, NAMES[0])
    content = json.loads((output / "release.json").read_text())
    content["checkpoints"][0]["commit"] = ["0123"]
    (output / "release.json").write_text(json.dumps(content))

    with pytest.raises(UnreadableFileError, match="is not the record of a release"):
        release(output, NAMES[0])
