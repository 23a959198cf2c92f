"""Files in the client's cache: downloads that go on, and files that arrived damaged."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub.file_download
import pytest
from hub_server import Hub

from converter.errors import UnreadableFileError
from converter.hub.access import Access
from converter.hub.downloads import discard, download, is_damaged, resolve

REPO, WEIGHTS = "owner/name", bytes(range(256)) * 400  # 100 kB


@pytest.fixture
def commit(hub: Hub) -> str:
    return hub.create_repo(REPO, {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS})


def test_a_branch_is_resolved_to_a_commit(hub: Hub, commit: str) -> None:
    found = resolve(REPO, "main", Access())

    assert (found.repo_id, found.commit) == (REPO, commit)
    assert found.names == ("config.json", "model.safetensors")


def test_a_download_goes_on_in_the_same_run(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the client keeps whole chunks only, of 10 MB
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.interrupt_next_download(after=70_000)
    path = download(REPO, "model.safetensors", commit, Access())

    assert path.read_bytes() == WEIGHTS
    assert [request.range for request in hub.requests if request.range] == ["bytes=70000-"]


def test_a_download_goes_on_in_the_next_run(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_early(_url: str, file: BinaryIO, **_: object) -> None:
        file.write(WEIGHTS[:30_000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(huggingface_hub.file_download, "http_get", stop_early)
        download(REPO, "model.safetensors", commit, Access())
    path = download(REPO, "model.safetensors", commit, Access())

    assert path.read_bytes() == WEIGHTS
    assert [request.range for request in hub.requests if request.range] == ["bytes=30000-"]
    assert not list(path.resolve().parent.glob("*.incomplete"))


def test_a_connection_that_breaks_again_and_again_is_enough_if_something_comes(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [WEIGHTS[start : start + 20_000] for start in range(0, len(WEIGHTS), 20_000)]

    def bring_a_piece(_url: str, file: BinaryIO, *, resume_size: int, **_: object) -> None:
        assert resume_size == file.tell()
        file.write(pieces.pop(0))
        if pieces:
            raise ConnectionResetError

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", bring_a_piece)

    assert download(REPO, "model.safetensors", commit, Access()).read_bytes() == WEIGHTS


def test_what_is_there_is_not_asked_for_again(hub: Hub, commit: str) -> None:
    first = download(REPO, "model.safetensors", commit, Access())
    hub.requests.clear()

    assert download(REPO, "model.safetensors", commit, Access()) == first
    assert hub.requests == []


def test_no_token_goes_to_where_large_files_are_stored(hub: Hub, commit: str) -> None:
    hub.add_user("ann", "hf_ann")
    download(REPO, "model.safetensors", commit, Access(token="hf_ann"))

    sent = {request.path.split("/")[1]: request.has_token for request in hub.requests}
    assert sent == {"owner": True, "cdn": False}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_told_by_its_digest(hub: Hub, commit: str, name: str) -> None:
    path = download(REPO, name, commit, Access())
    assert not is_damaged(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    assert is_damaged(path)


def test_a_small_file_that_is_damaged_is_fetched_once_more(hub: Hub, commit: str) -> None:
    path = download(REPO, "config.json", commit, Access())
    path.write_bytes(b'{"a": 2}')

    assert download(REPO, "config.json", commit, Access()).read_bytes() == b'{"a": 1}'


def test_a_small_file_that_stays_damaged_is_refused(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def damage(*arguments: Any, **keywords: Any) -> str:
        path = Path(huggingface_hub.file_download.hf_hub_download(*arguments, **keywords))
        path.write_bytes(b'{"a": 3}')
        fetched.append(path)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", damage)

    with pytest.raises(UnreadableFileError, match=r"config\.json of owner/name arrived damaged"):
        download(REPO, "config.json", commit, Access())
    assert len(fetched) == 2
    assert not fetched[0].exists()


def test_a_discarded_file_is_gone_with_its_content(hub: Hub, commit: str) -> None:
    path = download(REPO, "model.safetensors", commit, Access())
    blob = path.resolve()
    assert blob.name == hashlib.sha256(WEIGHTS).hexdigest()
    discard(path)

    assert not path.is_symlink()
    assert not blob.exists()
