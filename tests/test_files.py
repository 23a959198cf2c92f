"""Files: read only if regular and within limits, replaced as a whole."""

import errno
import os
import stat
from pathlib import Path

import pytest

import converter
from converter.errors import OutputError, UnreadableFileError
from converter.files import (
    open_regular,
    optional_path,
    prepare_place,
    read_json_object,
    replacing,
    sync_tree,
    write_json,
)


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"

    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "other").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "file").symlink_to(victim)

    write_json(tmp_path / "file", {"a": 1})

    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "file").is_symlink()
    assert read_json_object(tmp_path / "file") == {"a": 1}


def test_only_regular_files_are_opened_and_links_to_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")

    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match=r"not a regular file|directory"):
            open_regular(path)


def test_json_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"key": "x" * 100})

    with pytest.raises(UnreadableFileError, match="larger than 50 bytes"):
        read_json_object(path, 50)
    assert read_json_object(path)["key"] == "x" * 100


def test_a_disk_that_cannot_take_what_was_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"content")
    sync_tree(tmp_path)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        sync_tree(tmp_path)


def test_the_folder_of_a_file_is_made_and_an_impossible_place_is_refused(tmp_path: Path) -> None:
    prepare_place(tmp_path / "a/b/page.html")
    assert (tmp_path / "a/b").is_dir()

    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "a", tmp_path / "file/page.html"):
        with pytest.raises(OutputError, match="cannot be written"):
            prepare_place(place)


def test_a_report_that_cannot_be_written_is_known_before_anything_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.conversion.open_inputs", None)
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(OutputError, match=r"page\.html cannot be written"):
        converter.convert("tiny_panoptic_64", tmp_path / "out", report=tmp_path / "file/page.html")


def test_an_option_that_was_not_given_names_no_path() -> None:
    assert optional_path(None) is None
    assert optional_path("") is None
    assert optional_path("~/models") == Path("~/models").expanduser()
