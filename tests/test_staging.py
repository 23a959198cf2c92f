"""All or nothing."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest
from filelock import FileLock

from converter.errors import OutputError
from converter.staging import check_place, staged

MADE = {"config.json": None, "weights": None}


def make(place: Path, text: str = "new", *, force: bool = True) -> None:
    with staged(place, size=0, force=force, made=lambda _: MADE) as stage:
        for name in MADE:
            (stage.folder / name).write_text(text)
        stage.publish()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_only_the_finished_output_is_left(tmp_path: Path) -> None:
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
    with (
        pytest.raises(RuntimeError),
        staged(place, size=0, force=True, made=lambda _: MADE) as stage,
    ):
        (stage.folder / "config.json").write_text("new")
        raise RuntimeError

    assert (place / "config.json").read_text() == "old"
    make(place, "new")
    assert (place / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_an_output_with_something_in_it_needs_force(tmp_path: Path) -> None:
    make(tmp_path / "out")

    with pytest.raises(OutputError, match="--force replaces it"):
        check_place(tmp_path / "out", force=False, made=lambda _: MADE)
    check_place(tmp_path / "out", force=True, made=lambda _: MADE)


def test_an_empty_folder_may_become_the_output(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    check_place(place, force=False)
    make(place)

    assert names(place) == ["config.json", "weights"]


def test_force_does_not_replace_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(OutputError, match=r"thesis\.tex.*--force does not replace them"):
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


# Makes an output, and stops before it has made it, or before it moves a file or folder.
HOLD = """
import os, sys, time
from pathlib import Path
from converter.staging import staged
place, before = Path(sys.argv[1]), sys.argv[2]
os.path.ismount = lambda path: str(path) == os.environ.get("HOLD_MOUNT")
def hold():
    print("holding", flush=True)
    time.sleep(3600)
rename = Path.rename
def slow(path, target):
    if path.name == before and "output" in path.parts:
        hold()
    return rename(path, target)
Path.rename = slow
made = {"config.json": None, "weights": None}
with staged(place, size=0, force=True, made=lambda _: made) as stage:
    for name in made:
        (stage.folder / name).write_text("half")
    if before == "":
        hold()
    stage.publish()
"""


def holding(place: Path, before: str = "") -> subprocess.Popen[bytes]:
    """A process that is in the middle of making or publishing an output."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, place, before], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"holding\n"
    process.stdout.close()
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("stray", ["thesis.tex", "deep/thesis.tex", "weights/thesis.tex", "empty/"])
def test_only_what_this_tool_made_is_replaced(tmp_path: Path, stray: str, force: bool) -> None:
    place = tmp_path / "out"
    make(place, "old")
    if stray.startswith("weights"):
        (place / "weights").unlink()
    (place / stray).parent.mkdir(exist_ok=True)
    if stray.endswith("/"):
        (place / stray).mkdir()
    else:
        (place / stray).write_text("years of work")
    first = Path(stray).parts[0]

    with pytest.raises(OutputError, match=rf"did not make \({first}.*force does not replace them"):
        check_place(place, force=force, made=lambda _: MADE)
    with pytest.raises(OutputError, match=rf"did not make \({first}"):
        make(place, force=force)

    assert (place / stray).exists()
    assert (place / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("meanwhile", [False, True])
def test_what_was_changed_since_it_was_made_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool, meanwhile: bool
) -> None:
    place = tmp_path / "out"
    make(place, "old")
    made = {"config.json": None, "weights": hashlib.sha256(b"old").hexdigest(), "gone": "0" * 64}
    monkeypatch.setattr(os.path, "ismount", lambda path: inside and Path(path) == place)
    check_place(place, force=True, made=lambda _: made)
    if not meanwhile:
        (place / "weights").write_text("trained")
        with pytest.raises(OutputError, match="exists"):
            check_place(place, force=False, made=lambda _: made)
        with pytest.raises(OutputError, match=r"changed since .* \(weights\)"):
            check_place(place, force=True, made=lambda _: made)

    with (
        pytest.raises(OutputError, match=r"changed since .* \(weights\); --force does not replace"),
        staged(place, size=0, force=True, made=lambda _: made) as stage,
    ):
        (stage.folder / "config.json").write_text("new")
        (place / "weights").write_text("trained")
        stage.publish()

    assert contents(place) == {"config.json": "old", "weights": "trained"}
    assert names(tmp_path) == ["out"]


def test_an_output_is_read_only_when_it_is_checked_and_when_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, read = tmp_path / "out", []
    make(place, "old")
    made = {"config.json": None, "weights": hashlib.sha256(b"old").hexdigest()}

    def digest(path: Path) -> str:
        read.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr("converter.staging.sha256", digest)
    check_place(place, force=True, made=lambda _: made)
    assert read == ["weights"]
    with staged(place, size=0, force=True, made=lambda _: made) as stage:
        assert read == ["weights"]
        (stage.folder / "config.json").write_text("new")
        stage.publish()

    assert read == ["weights", "weights"]
    assert contents(place) == {"config.json": "new"}


@pytest.mark.parametrize("inside", [False, True])
def test_what_somebody_adds_to_an_output_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    place = tmp_path / "out"
    make(place, "old")
    monkeypatch.setattr(os.path, "ismount", lambda path: inside and Path(path) == place)

    with (
        pytest.raises(OutputError, match=r"did not make \(thesis\.tex\)"),
        staged(place, size=0, force=True, made=lambda _: MADE) as stage,
    ):
        (stage.folder / "config.json").write_text("new")
        (place / "thesis.tex").write_text("years of work")
        stage.publish()

    assert contents(place) == {
        "config.json": "old",
        "thesis.tex": "years of work",
        "weights": "old",
    }
    assert names(tmp_path) == ["out"]


def test_an_output_that_was_made_meanwhile_is_not_replaced_without_force(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="--force replaces it"),
        staged(tmp_path / "out", size=0, made=lambda _: MADE) as stage,
    ):
        (stage.folder / "config.json").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("theirs")
        stage.publish()

    assert contents(tmp_path / "out") == {"config.json": "theirs"}
    assert names(tmp_path) == ["out"]


# an output that nothing can be renamed to ---------------------------------------------------------


@pytest.fixture(params=["mount point", "parent that cannot be written"])
def fixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that no other folder can replace."""
    place = tmp_path / "out"
    place.mkdir()
    rename, make_folder = Path.rename, tempfile.mkdtemp
    if request.param == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place)

    def rename_within(path: Path, target: Path) -> Path:
        if tmp_path in (path.parent, target.parent):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    def make_within(*, prefix: str, dir: Path) -> str:
        if dir == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return make_folder(prefix=prefix, dir=dir)

    monkeypatch.setattr(Path, "rename", rename_within)
    monkeypatch.setattr("converter.staging.mkdtemp", make_within)
    return place


def test_an_output_that_nothing_can_be_renamed_to_is_filled_and_replaced(fixed: Path) -> None:
    check_place(fixed, force=False)
    make(fixed, "old", force=False)
    assert contents(fixed) == {"config.json": "old", "weights": "old"}

    with pytest.raises(OutputError, match="--force replaces it"):
        make(fixed, force=False)
    make(fixed, "new")
    assert contents(fixed) == {"config.json": "new", "weights": "new"}
    assert names(fixed.parent) == ["out"]


def test_files_of_a_file_system_do_not_stop_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    (place / "lost+found").mkdir(parents=True)
    with pytest.raises(OutputError, match="did not make"):
        make(place, force=False)

    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place)
    make(place, "old", force=False)
    make(place, "new")

    assert names(place) == ["config.json", "lost+found", "weights"]


def test_config_json_comes_last_and_goes_first(
    fixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        done = rename(path, target)
        seen.append(sorted(contents_of_files(fixed)))
        return done

    make(fixed, "old")
    monkeypatch.setattr(Path, "rename", watched)
    make(fixed, "new")

    assert seen == [["weights"], [], ["weights"], ["config.json", "weights"]]


def contents_of_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


@pytest.mark.parametrize("failing", [("output", "config.json"), ("output", "weights")])
def test_a_replacement_that_stops_halfway_is_undone(
    fixed: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[str, str]
) -> None:
    make(fixed, "old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.parts[-2:] == failing and target.parent == fixed:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(fixed, "new")

    assert contents(fixed) == {"config.json": "old", "weights": "old"}


@pytest.mark.parametrize("bind", [False, True])
def test_a_real_mount_point_is_filled_and_replaced(tmp_path: Path, bind: bool) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (tmp_path / "disk").mkdir()
    what = f"--bind {tmp_path / 'disk'}" if bind else "-t tmpfs none"
    code = (
        "import sys\nsys.path.insert(0, sys.argv[2])\nfrom pathlib import Path\n"
        "from test_staging import contents, make\nplace = Path(sys.argv[1])\n"
        "make(place, 'old', force=False)\nmake(place, 'new')\n"
        "assert contents(place) == {'config.json': 'new', 'weights': 'new'}\n"
    )
    script = f'mount {what} "$0" || exit 77; exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(place)]
    command += [sys.executable, "-c", code, str(place), str(Path(__file__).parent)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("nothing can be mounted here")

    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["disk", "out"]


def test_a_folder_in_a_folder_that_really_cannot_be_written_is_filled(tmp_path: Path) -> None:
    place = tmp_path / "parent" / "out"
    place.mkdir(parents=True)
    command = [sys.executable, "-c"]
    command += [
        "import sys\nsys.path.insert(0, sys.argv[2])\nfrom pathlib import Path\n"
        "from test_staging import make\nmake(Path(sys.argv[1]), force=False)\n"
    ]
    command += [str(place), str(Path(__file__).parent)]
    if os.geteuid() == 0:  # permissions do not stop root
        if not shutil.which("setpriv"):
            pytest.skip("there is no setpriv")
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    place.parent.chmod(0o555)
    try:
        subprocess.run(command, check=True)
        assert contents(place) == {"config.json": "new", "weights": "new"}
        assert names(place.parent) == ["out"]
    finally:
        place.parent.chmod(0o755)


@pytest.mark.parametrize("before", ["", "weights", "config.json"])
@pytest.mark.parametrize("old", [False, True])
def test_what_a_killed_run_left_in_an_output_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, old: bool
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    if old:
        make(place, "old")
    monkeypatch.setenv("HOLD_MOUNT", str(place))
    kill(holding(place, before))
    assert (place / "config.json").exists() == (old and before == "")

    if old:
        with pytest.raises(OutputError, match="--force replaces it"):
            check_place(place, force=False, made=lambda _: MADE)
        assert contents(place) == {"config.json": "old", "weights": "old"}
    else:
        check_place(place, force=False)
        assert names(place) == []


# on the disk, before it has its name ----------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_finished_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: inside and Path(path) == place)
    synced: list[int] = []
    fsync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(path: Path, target: Path) -> Path:
        if target == place or target.parent == place:
            made = path.parent if inside else path
            missing = [p for p in (made, *made.iterdir()) if p.stat().st_ino not in synced]
            assert not missing
            synced.remove(path.stat().st_ino)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    with staged(place, size=0) as stage:
        for name in MADE:
            (stage.folder / name).write_text("new")
        (stage.folder / "images").mkdir()
        (stage.folder / "images" / "0.png").write_text("")
        stage.publish()

    assert (place if inside else tmp_path).stat().st_ino in synced


# one at a time --------------------------------------------------------------------------------


def test_two_runs_at_once_for_one_output_do_not_collide(tmp_path: Path) -> None:
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
    kill(holding(tmp_path / "out"))

    assert not (tmp_path / "out").exists()
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_an_output_is_put_back_if_its_replacement_was_killed(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    kill(holding(tmp_path / "out", "output"))
    assert not (tmp_path / "out").exists()

    with pytest.raises(OutputError, match="--force replaces it"):
        check_place(tmp_path / "out", force=False, made=lambda _: MADE)

    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def _race(place: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with staged(place, size=0, force=True, made=lambda _: MADE) as stage:
                # one that met another would find its file, or lose its own
                mine = stage.folder / "config.json"
                with mine.open("x") as file:
                    file.write(str(os.getpid()))
                assert mine.read_text() == str(os.getpid())
                stage.publish()
        except OutputError as error:
            assert "is writing to" in error.message  # noqa: PT017


def test_many_runs_at_once_never_collide(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_race, args=(tmp_path / "out", 1.0)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json"]


def test_the_lock_is_in_a_folder_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make(tmp_path / "out")

    folder = tmp_path / "cache" / "eomt-convert"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("planted", ["link", "open to others", "file"])
def test_locks_are_not_put_into_a_folder_that_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    cache, temporary, victim = (tmp_path / name for name in ("cache", "temporary", "victim"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for folder in (cache, temporary, victim):
        folder.mkdir()
    places = (cache / "eomt-convert", temporary / f"eomt-convert-{os.geteuid()}")

    def plant(place: Path) -> None:
        if planted == "link":
            place.symlink_to(victim)
        elif planted == "file":
            place.write_text("")
        else:
            place.mkdir()
            place.chmod(0o777)

    plant(places[0])
    make(tmp_path / "out")
    assert stat.S_IMODE(places[1].stat().st_mode) == 0o700

    shutil.rmtree(places[1])
    plant(places[1])
    with pytest.raises(OutputError, match="no folder for locks"):
        make(tmp_path / "out")
    assert names(victim) == []


def test_without_a_home_locks_are_in_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", str)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "out")

    assert names(tmp_path) == [f"eomt-convert-{os.geteuid()}", "out"]


def test_a_missing_home_is_not_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make(tmp_path / "out")

    assert names(tmp_path) == [f"eomt-convert-{os.geteuid()}", "out"]


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: FileLock) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", fail)
    with pytest.raises(OutputError, match=r"its disk, or .* does not support locks"):
        make(tmp_path / "out")


# what others have put there -------------------------------------------------------------------


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("name", [".out.eomt-convert", ".out.eomt-convert-abcdefgh"])
def test_a_stage_that_somebody_planted_is_left_alone(tmp_path: Path, name: str, link: bool) -> None:
    victim = tmp_path / "victim"
    area = victim if link else tmp_path / name
    for part in ("output", "replaced", "replaced/out"):
        (area / part).mkdir(parents=True)
    for part in ("lock", "thesis.tex", "replaced/.bashrc", "replaced/out/config.json"):
        (area / part).write_text("precious")
    marker = {"tool": "eomt-convert", "output": "out", "folder": 12345}
    (area / "stage.json").write_text(json.dumps(marker))
    if link:
        (tmp_path / name).symlink_to(victim)
    before = everything(tmp_path)

    make(tmp_path / "out")

    shutil.rmtree(tmp_path / "out")
    assert everything(tmp_path) == before


def test_links_in_a_planted_stage_are_not_followed(tmp_path: Path) -> None:
    victim, area = tmp_path / "victim", tmp_path / ".out.eomt-convert"
    victim.mkdir()
    area.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    (area / "lock").symlink_to(victim / "thesis.tex")
    (area / "replaced").symlink_to(victim)
    shutil.copytree(area, tmp_path / ".out.eomt-convert-12345678", symlinks=True)
    before = everything(tmp_path)

    make(tmp_path / "out")

    shutil.rmtree(tmp_path / "out")
    assert everything(tmp_path) == before


def everything(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def test_the_stage_of_a_living_run_with_locks_elsewhere_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = holding(tmp_path / "out")
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        make(tmp_path / "out")
        assert len([name for name in names(tmp_path) if name.startswith(".out.")]) == 1
    finally:
        kill(process)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_the_stage_of_another_user_is_left_alone(tmp_path: Path) -> None:
    kill(holding(tmp_path / "out"))
    (area,) = tmp_path.iterdir()
    os.chown(area, 12345, 12345)

    make(tmp_path / "out")

    assert (area / "output" / "weights").exists()


def test_a_run_that_was_killed_before_it_wrote_anything_leaves_nothing(tmp_path: Path) -> None:
    for name in ("12345678", "abcdefgh"):
        (tmp_path / f".out.eomt-convert-{name}").mkdir(mode=0o700)
    (tmp_path / ".out.eomt-convert-abcdefgh" / "lock").touch()

    make(tmp_path / "out")

    assert names(tmp_path) == ["out"]


def test_a_folder_in_the_place_of_an_output_that_is_to_be_restored_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "out"
    make(place, "old")
    kill(holding(place, "output"))
    make(tmp_path / "other", "other")
    (tmp_path / "other").rename(place)

    with pytest.raises(OutputError, match=r"had moved .*out to .*replaced, to replace it"):
        make(place)
    assert contents(place) == {"config.json": "other", "weights": "other"}

    shutil.rmtree(place)
    with pytest.raises(OutputError, match="--force replaces it"):
        make(place, force=False)
    assert contents(place) == {"config.json": "old", "weights": "old"}


def test_leftovers_that_cannot_be_removed_do_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output that was replaced has a folder in it that is kept from being removed."""
    place = tmp_path / "out"
    make(place)
    with monkeypatch.context() as stuck:
        stuck.setattr("converter.staging._remove", refuse_to_remove)
        make(place, "newer")
        make(place, "newest")

    make(place, "last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refuse_to_remove(folder: Path) -> None:
    raise PermissionError(13, "Permission denied", str(folder))
