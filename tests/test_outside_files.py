"""Files from outside, through the commands: what is no regular file, too large, or senseless."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import FIXTURES

pytestmark = pytest.mark.numbers

Command = Callable[..., Result]

TINY = FIXTURES / "tiny_panoptic_64"
CONVERT = (
    *("--delta", TINY / "delta", "--backbone", TINY / "backbone"),
    *("--task", "panoptic", "--image-size", "64", "--output", "out"),
)
SEGMENT = ("segment", "model", TINY / "images" / "0.png", "--output", "out")


@contextmanager
def no_waiting(seconds: int = 30) -> Iterator[None]:
    """Ends what waits for a pipe."""

    def give_up(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def error_of(command: Command, *arguments: str | Path) -> str:
    """The one message of a command that fails as it should."""
    with no_waiting():
        result = command(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def edit(file: Path, **changes: Any) -> None:
    """Changes values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# no regular files --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ((*CONVERT, "--labels", "special"), "special"),
        ((*CONVERT, "--backbone-config", "special"), "special"),
        (("verify", "model", "--level", "1"), "model/config.json"),
        (("verify", "model"), "model/config.json"),
        (("verify", "model", "--level", "1"), "model/preprocessor_config.json"),
        (SEGMENT, "model/config.json"),
        (("segment", "model", "special", "--output", "out"), "special"),
        (("record", "model", "--output", "out", "--image", "special"), "special"),
        (("inspect", "special"), "special"),
    ],
)
def test_a_pipe_or_a_device_ends_in_one_error_at_once(
    command: Command, model: Path, arguments: tuple[str, ...], file: str, kind: str, tmp_path: Path
) -> None:
    place = tmp_path / file
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero")

    message = error_of(command, *arguments)

    assert Path(file).name in message
    assert any(reason in message for reason in ("no regular file", "no file", "a device", "has no"))


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ((*CONVERT, "--labels", "large"), "large"),
        ((*CONVERT, "--backbone-config", "large"), "large"),
        (("verify", "model", "--level", "1"), "model/config.json"),
        (SEGMENT, "model/config.json"),
        (("segment", "model", "large", "--output", "out"), "large"),
        (("verify", "model", "--recorded", "large"), "large"),
    ],
)
def test_a_file_larger_than_its_kind_is_not_read(
    command: Command, model: Path, arguments: tuple[str, ...], file: str, tmp_path: Path
) -> None:
    with (tmp_path / file).open("wb") as sparse:
        sparse.truncate(2**35)

    message = error_of(command, *arguments)

    assert f"{Path(file).name}" in message
    assert "larger than" in message
    assert "bytes" in message
