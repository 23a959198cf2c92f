"""All or nothing."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from converter.errors import OutputError
from converter.staging import check_place, staged


def make(place: Path, text: str = "new") -> None:
    with staged(place, size=0) as stage:
        (stage.folder / "config.json").write_text(text)
        stage.publish(place)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_finished_output_stands_alone(tmp_path: Path) -> None:
    make(tmp_path / "out")

    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_nothing_is_left_of_a_run_that_fails(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        staged(tmp_path / "deep" / "er" / "out", size=0) as stage,
    ):
        (stage.folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    assert names(tmp_path) == []


def test_an_output_that_is_replaced_stays_until_the_new_one_is_there(tmp_path: Path) -> None:
    place = tmp_path / "out"
    make(place, "old")
    with pytest.raises(RuntimeError), staged(place, size=0) as stage:
        (stage.folder / "config.json").write_text("new")
        raise RuntimeError

    assert (place / "config.json").read_text() == "old"
    make(place, "new")
    assert (place / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_an_output_with_something_in_it_needs_force(tmp_path: Path) -> None:
    make(tmp_path / "out")

    with pytest.raises(OutputError, match="--force replaces it"):
        check_place(tmp_path / "out", force=False)
    check_place(tmp_path / "out", force=True)


def test_an_empty_folder_may_become_the_output(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    check_place(place, force=False)
    make(place)

    assert names(place) == ["config.json"]


def test_force_does_not_replace_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(OutputError, match=r"thesis\.tex.*--force does not replace that"):
        check_place(tmp_path, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_an_output_path_that_is_a_file_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("")

    with pytest.raises(OutputError, match="is a file"):
        check_place(tmp_path / "out", force=force)


def test_a_place_that_cannot_be_written_is_an_error_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="cannot be written"):
        make(tmp_path / "file" / "out")
    assert names(tmp_path) == ["file"]


def test_a_disk_without_the_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=10**9))

    with pytest.raises(OutputError, match=r"needs 1\.20 GB, its disk has 1\.00 GB"):
        staged(tmp_path / "out", size=1_200_000_000).__enter__()
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="No space left on device"),
        staged(tmp_path / "out", size=0) as stage,
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        (stage.folder / "config.json").write_text("{}")
        full.write(b"0")
    assert names(tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
from converter.staging import staged
place = Path(sys.argv[1])
with staged(place, size=0) as stage:
    (stage.folder / "config.json").write_text("half")
    if sys.argv[2] == "replacing":
        place.rename(stage.area / "replaced-by-hand")
        (stage.area / "replaced").mkdir()
        (stage.area / "replaced-by-hand").rename(stage.area / "replaced" / place.name)
    print("holding", flush=True)
    time.sleep(3600)
"""


def holding(place: Path, *, replacing: bool = False) -> subprocess.Popen[bytes]:
    """A process that is in the middle of making an output."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place), "replacing" if replacing else "making"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"holding\n"
    process.stdout.close()
    return process


def test_two_at_once_for_one_output_do_not_meet(tmp_path: Path) -> None:
    process = holding(tmp_path / "out")
    try:
        with pytest.raises(OutputError, match=rf"process {process.pid}\) is writing"):
            make(tmp_path / "out")
        make(tmp_path / "other")
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_no_output_and_the_next_one_clears_up(tmp_path: Path) -> None:
    process = holding(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert not (tmp_path / "out").exists()
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_an_output_is_put_back_if_its_replacement_was_killed(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    process = holding(tmp_path / "out", replacing=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()

    with pytest.raises(RuntimeError), staged(tmp_path / "out", size=0):
        raise RuntimeError

    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def _race(place: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with staged(place, size=0) as stage:
                # one that met another would find its file, or lose its own
                mine = stage.folder / "config.json"
                with mine.open("x") as file:
                    file.write(str(os.getpid()))
                assert mine.read_text() == str(os.getpid())
                stage.publish(place)
        except OutputError as error:
            assert "is writing to" in error.message  # noqa: PT017


def test_many_at_once_never_meet(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_race, args=(tmp_path / "out", 1.0)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json"]
