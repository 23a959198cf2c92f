"""What strangers wrote is shown, and does nothing, wherever it is printed."""

import base64
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from click.testing import Result
from conftest import FIXTURES, HANGS, over_lfs
from hub_faults import Status
from hub_server import Hub, shorten_client_waits

from converter.errors import UnreadableFileError
from converter.outside import json_text, visible

TINY = FIXTURES / "tiny_panoptic_64"
SHAPES = FIXTURES / "shapes_panoptic_128"
PICTURE = SHAPES / "val" / "images" / "000000.png"

# an escape sequence, a C1 control character, a right-to-left override, half of a character
HOSTILE = "\x1b[2J\x9b31m\u202eevil\ud800"
SHOWN = "\\x1b[2J\\x9b31m\\u202eevil\\ud800"

# without that half, for files that are refused where they hold one
HOSTILE_TEXT, SHOWN_TEXT = HOSTILE[:-1], SHOWN[:-6]

# for file names: lone surrogates are only possible for bytes that are not UTF-8
HOSTILE_NAME = "\x1b[2J\u202eevil\nverdict   passed\udcff"
SHOWN_NAME = "\\x1b[2J\\u202eevil\\nverdict   passed\\udcff"

RUN = "from converter.cli import main; main()"

Command = Callable[..., Result]


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def is_harmless(result: Result) -> bool:
    """Whether all printed characters are visible, in lines of a sensible length."""
    lines = result.output.split("\n")
    return all(line.isprintable() and len(line) <= 1000 for line in lines)


def test_what_would_act_on_a_terminal_is_visible() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("a\nb\r\u200b\u2028\u2066\U000e0001") == (
        "a\\nb\\r\\u200b\\u2028\\u2066\\U000e0001"
    )
    assert visible("Straße, 空, café, C:\\n") == "Straße, 空, café, C:\\n"


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    shown = visible("begin" + "\x1b" * 70_000 + "end")

    assert len(shown) == 1000
    assert shown.startswith("begin\\x1b")
    assert " ... " in shown
    assert shown.endswith("\\x1bend")


@pytest.mark.parametrize("only_ascii", [True, False])
def test_json_is_complete_and_has_only_printable_characters(only_ascii: bool) -> None:
    content = {HOSTILE: ["\x7f\u2028\U000e0001", "Straße", "x" * 100_000, "a\nb"]}
    text = json_text(content, only_ascii=only_ascii)

    assert all(line.isprintable() for line in text.split("\n"))
    assert json.loads(text) == content
    assert text.isascii() == only_ascii


# every command ----------------------------------------------------------------------------------


@pytest.fixture
def shapes(converted: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model whose first class has a hostile name, and whose second has a long one."""
    folder = tmp_path / "shapes"
    shutil.copytree(converted("shapes_panoptic_128"), folder)
    names = json.loads((folder / "config.json").read_text())["id2label"]
    change_json(folder / "config.json", id2label=names | {"0": HOSTILE_TEXT, "1": "x" * 65_000})
    return folder


def test_class_names_in_an_evaluation_are_harmless(
    command: Command, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(SHAPES / "val", data)
    categories = json.loads((data / "panoptic.json").read_text())["categories"]
    categories[0]["name"], categories[1]["name"] = HOSTILE, "x" * 65_000
    change_json(data / "panoptic.json", categories=categories)
    model = converted("shapes_panoptic_128")
    arguments = ("evaluate", model, "--dataset", "coco-panoptic", "--data", data, "--limit", "1")
    result = command(*arguments)
    found = json.loads(command(*arguments, "--json").stdout)

    assert result.exit_code == 0
    assert is_harmless(result)
    # only the names are long, not every line of the table
    lines = [line for line in result.stdout.splitlines() if line.startswith(SHOWN)]
    assert len(lines[0]) < 300
    assert [row["class"] for row in found["per_class"]][:2] == [HOSTILE, "x" * 65_000]


def test_names_of_segmented_classes_and_pictures_are_harmless(
    command: Command, shapes: Path, tmp_path: Path
) -> None:
    names = json.loads((shapes / "config.json").read_text())["id2label"]
    change_json(shapes / "config.json", id2label=dict.fromkeys(names, HOSTILE_TEXT))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(PICTURE, pictures / f"{HOSTILE_NAME}.png")
    (pictures / f"broken{HOSTILE_NAME}.png").write_bytes(b"no picture")
    result = command("segment", shapes, pictures, "--output", "out", "--threshold", "0")
    as_json = command("segment", shapes, pictures, "--output", "out", "--force", "--json")

    assert result.exit_code == as_json.exit_code == 1
    assert is_harmless(result)
    assert f"/{SHOWN_NAME}.png -> out/" in result.stdout
    assert SHOWN_TEXT in result.stdout.partition(" -> ")[2]
    assert f"/broken{SHOWN_NAME}.png: " in result.stderr
    content = json.loads(as_json.stdout)
    assert content["pictures"][0]["picture"].endswith(f"/{HOSTILE_NAME}.png")
    assert set(content["categories"].values()) == {HOSTILE_TEXT}


def test_names_of_files_in_summaries_and_errors_are_harmless(
    command: Command, tmp_path: Path
) -> None:
    delta = tmp_path / f"{HOSTILE_NAME}.bin"
    shutil.copy(TINY / "delta" / "pytorch_model.bin", delta)
    sources = ("--delta", delta, "--backbone", TINY / "backbone", "--image-size", "64")
    summary = command(*sources, "--task", "panoptic", "--output", HOSTILE_NAME)
    missing = command("inspect", f"missing{HOSTILE_NAME}.bin")

    assert (summary.exit_code, missing.exit_code) == (0, 1)
    assert is_harmless(summary)
    assert f"{SHOWN_NAME}.bin" in summary.stdout
    assert f"output    {SHOWN_NAME} (" in summary.stdout
    assert summary.stdout.splitlines().count("verdict   passed") == 0
    assert is_harmless(missing)
    assert f"missing{SHOWN_NAME}" in missing.stderr


def test_a_name_in_a_usage_error_is_harmless(command: Command) -> None:
    result = command(f"--nonsense{HOSTILE_NAME}")

    assert result.exit_code == 2
    assert all(line.isprintable() for line in result.output.split("\n"))
    assert "\\x1b[2J" in result.stderr


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": HOSTILE}),
        ("config.json", {"hidden_act": HOSTILE}),
        ("config.json", {"patch_size": HOSTILE}),
        ("config.json", {HOSTILE: HOSTILE}),
        ("config.json", {"hidden_size": 65_000 * "9"}),
        ("config.json", {"id2label": {HOSTILE: HOSTILE}}),
        ("preprocessor_config.json", {"image_processor_type": HOSTILE}),
        ("preprocessor_config.json", {"image_processor_type": 65_000 * "x"}),
        ("preprocessor_config.json", {HOSTILE: HOSTILE}),
        ("conversion.json", {"task": HOSTILE}),
        ("conversion.json", {"checkpoint": HOSTILE}),
    ],
)
def test_keys_and_values_of_a_models_files_are_harmless(
    command: Command, model: Path, file: str, changes: dict[str, Any]
) -> None:
    change_json(model / file, **changes)
    for arguments in (
        ("verify", model, "--recorded", TINY),
        ("segment", model, PICTURE, "--output", "out"),
        ("--delta", model, "--output", "converted"),
    ):
        result = command(*arguments, "--debug")
        assert result.exit_code in (0, 1, 2, 3)
        assert is_harmless(result)
        assert "This is a bug" not in result.stderr


def test_names_of_tensors_in_conversion_json_are_harmless(command: Command, model: Path) -> None:
    tensors = json.loads((model / "conversion.json").read_text())["tensors"]
    some = next(iter(tensors.values()))
    names = {HOSTILE_TEXT: some, f"a{HOSTILE_TEXT}\nverdict   passed": some, "b" * 65_000: some}
    change_json(model / "conversion.json", tensors=names, checkpoint=None)
    result = command("verify", model, "--recorded", TINY)

    assert result.exit_code == 3
    assert is_harmless(result)
    assert SHOWN_TEXT in result.stdout
    assert "verdict   passed" not in result.stdout.splitlines()


def test_a_hostile_class_name_is_harmless_in_files_tables_and_pages(
    command: Command, shapes: Path
) -> None:
    report = command("verify", shapes, "--recorded", SHAPES, "--report", "page.html")
    converted = command("--delta", shapes, "--output", "again", "--no-verify")

    assert report.exit_code in (0, 3)
    assert converted.exit_code == 0
    assert is_harmless(report)
    assert is_harmless(converted)
    assert Path("page.html").read_text(encoding="utf-8")
    assert Path("again/config.json").read_text(encoding="utf-8")


def test_a_lone_surrogate_is_refused_and_shown(command: Command, shapes: Path) -> None:
    names = json.loads((shapes / "config.json").read_text())["id2label"]
    change_json(shapes / "config.json", id2label=names | {"0": HOSTILE})
    change_json(shapes / "conversion.json", **{HOSTILE: 1})
    for arguments in (
        ("verify", shapes, "--recorded", SHAPES),
        ("--delta", shapes, "--output", "b"),
    ):
        result = command(*arguments)
        assert result.exit_code == 1
        assert is_harmless(result)
        assert "holds half of a character" in result.stderr


def test_names_of_repositories_branches_and_tags_are_harmless(
    command: Command, hub: Hub, me: str, model: Path
) -> None:
    hub.create_repo("me/model", {"config.json": b"{}"})
    name = "\x9b31mevil"  # which the Hub of the tests can put into a header
    for arguments in (
        ("inspect", f"me/model@{name}"),
        ("inspect", f"me/{name}"),
        ("push", model, f"me/{name}"),
        ("push", model, "me/model", "--dry-run", "--revision", name),
        ("push", model, "me/model", "--dry-run", "--tag", name),
        ("--checkpoint", name),
        ("release", "--checkpoint", "tiny_panoptic_64", "--namespace", name),
    ):
        result = command(*arguments, "--debug")
        assert result.exit_code in (0, 1, 2, 4)
        assert is_harmless(result)
        assert result.exit_code == 0 or "\\x9b31mevil" in result.output
        assert "This is a bug" not in result.stderr


# standard output --------------------------------------------------------------------------------


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash, in which ``$EOMT`` is the command."""
    executable = f"{sys.executable} -c '{RUN}'"
    return subprocess.run(
        ["/bin/bash", "-c", command.replace("$EOMT", executable) + "; exit ${PIPESTATUS[0]}"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


@pytest.mark.parametrize(
    "command", ["list", "list --json", "--help", "--version", f"inspect {TINY / 'delta'} --json"]
)
def test_a_closed_pipe_ends_the_command_silently(command: str, tmp_path: Path) -> None:
    done = run(f"$EOMT {command} | head -0", tmp_path)

    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    "command", ["list", "list --json", "--help", "--version", f"inspect {TINY / 'delta'} --json"]
)
def test_a_full_disk_is_an_error(command: str, tmp_path: Path) -> None:
    done = run(f"$EOMT {command} > /dev/full", tmp_path)

    assert done.returncode == 1
    assert done.stderr == "Error: Standard output cannot be written: No space left on device.\n"


def test_streams_that_are_closed_from_the_start_are_not_a_bug(tmp_path: Path) -> None:
    out = run("$EOMT list >&-", tmp_path)
    err = run("$EOMT inspect nothing.bin 2>&-", tmp_path)
    full = run("$EOMT inspect nothing.bin 2>/dev/full", tmp_path)

    assert out.returncode == 1
    assert "cannot be written: Bad file descriptor" in out.stderr
    assert (err.returncode, full.returncode) == (1, 1)


def test_an_encoding_that_lacks_a_character_is_not_a_bug(tmp_path: Path) -> None:
    (tmp_path / "é.bin").mkdir()
    shutil.copy(TINY / "delta" / "pytorch_model.bin", tmp_path / "é.bin")
    line = f"$EOMT --delta é.bin --backbone {TINY / 'backbone'} --task panoptic --image-size 64 "
    line += "--output out --no-verify"
    text = run(line, tmp_path, PYTHONIOENCODING="ascii")
    as_json = run(f"{line} --force --json", tmp_path, PYTHONIOENCODING="ascii")

    assert text.returncode == as_json.returncode == 0
    assert "\\xe9.bin" in text.stdout
    assert as_json.stdout.isascii()
    assert json.loads(as_json.stdout)["output"].endswith("/out")


# passwords --------------------------------------------------------------------------------------

PASSWORD = "sesame%21word"  # noqa: S105


@pytest.fixture
def locked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub that needs a user name and a password, which are in HF_ENDPOINT."""
    login = base64.b64encode(b"ann:" + unquote(PASSWORD).encode()).decode()
    for token in (f"Basic {login}", "hf_of_ann"):
        hub.add_user("ann", token)
    address = hub.endpoint.replace("//", f"//ann:{PASSWORD}@")
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_of_ann")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    return hub


def has_no_password(text: str) -> bool:
    login = base64.b64encode(b"ann:" + unquote(PASSWORD).encode()).decode()
    return not any(word in text for word in ("sesame", "ann:", login))


@over_lfs
def test_a_password_of_the_hub_is_in_no_publication(
    command: Command, locked: Hub, model: Path
) -> None:
    planned = command("push", model, "ann/model", "--dry-run")
    result = command("push", model, "ann/model", "--json")
    again = command("push", model, "ann/model", "--create-pr")

    assert (planned.exit_code, result.exit_code, again.exit_code) == (0, 0, 0)
    assert f"nothing was sent to {locked.endpoint}/ann/model (private)" in planned.stdout
    assert json.loads(result.stdout)["url"] == f"{locked.endpoint}/ann/model/tree/main"
    assert has_no_password(planned.output + result.output + again.output)


@over_lfs
def test_a_password_of_the_hub_is_in_no_release(
    command: Command, locked: Hub, tmp_path: Path
) -> None:
    result = command("release", "--checkpoint", "tiny_panoptic_64", "--namespace", "ann")

    assert result.exit_code == 0
    written = [(tmp_path / "release" / name).read_text() for name in ("release.json", "release.md")]
    assert f"{locked.endpoint}/ann/" in written[0]
    assert has_no_password(result.output + "".join(written))


@over_lfs
@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
def test_a_password_of_the_hub_is_in_no_error(
    command: Command, locked: Hub, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_client_waits(monkeypatch)
    locked.break_request(Status(status, f"no {os.environ['HF_ENDPOINT']}"), times=None)
    result = command("inspect", "ann/model", "--debug", "--json")

    assert result.exit_code in (1, 4)
    assert "Traceback" in result.stderr
    assert has_no_password(result.output)


@pytest.mark.parametrize("password", [PASSWORD, "se/same", "sesame#1", "sesame:2@3"])
def test_a_password_is_not_printed_where_nobody_answers(tmp_path: Path, password: str) -> None:
    line = "$EOMT --checkpoint coco_panoptic_small_640 --debug"
    done = run(
        line, tmp_path, HF_ENDPOINT=f"http://ann:{password}@127.0.0.1:9", HF_HOME=str(tmp_path)
    )

    assert done.returncode in (1, 2)
    assert "This is a bug" not in done.stderr
    assert has_no_password(done.stderr)


def test_what_libraries_log_is_harmless_too(
    command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://ann:{PASSWORD}@mirror")

    def fetch(*_: object) -> None:
        logging.getLogger("huggingface_hub.utils").warning(
            "Retrying %s\n%s", f"http://ann:{PASSWORD}@mirror/x", HOSTILE
        )
        raise UnreadableFileError("none")

    monkeypatch.setattr("converter.hub.sources.fetch", fetch)
    command("inspect", "owner/name")

    assert caplog.messages == [f"Retrying http://mirror/x\n{SHOWN}"]
