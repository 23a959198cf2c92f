"""Files in the client's cache: what is asked of the Hub, and files that arrived damaged."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from conftest import in_every_way, over_lfs, over_xet
from hub_faults import Truncated
from hub_server import Hub

from converter.errors import AccessError, HubUnavailableError, OutputError, UnreadableFileError
from converter.hub.access import Access, Snapshot
from converter.hub.downloads import download, download_again, is_damaged, resolve

REPO, OTHER = "owner/name", "owner/other"
CONFIG, WEIGHTS = b'{"a": 1}', bytes(range(256)) * 400  # 100 kB
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()

OFFLINE = Access(local_files_only=True)


@pytest.fixture
def commit(hub: Hub) -> str:
    return hub.create_repo(REPO, {"config.json": CONFIG, "model.safetensors": WEIGHTS})


def fetch(name: str, access: Access | None = None, repo_id: str = REPO) -> Path:
    """Fetches a file of main as a new command does."""
    access = access or Access()
    return download(resolve(repo_id, "main", access), name, access)


def change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().chmod(0o644)  # files of the store that repositories share are read-only
    path.write_bytes(content)


# asking ----------------------------------------------------------------------------------------


def test_a_branch_is_resolved_to_a_commit_and_what_it_has(hub: Hub, commit: str) -> None:
    found = resolve(REPO, "main", Access())

    assert (found.repo_id, found.revision, found.commit) == (REPO, "main", commit)
    # printf '{"a": 1}' | git hash-object --stdin
    config = "4a036f56bb619924ec4189bd84ed716c766971ae"
    assert found.digests == {"config.json": config, "model.safetensors": SHA256}


def test_a_branch_is_resolved_once_a_command(hub: Hub, commit: str) -> None:
    access = Access()
    for revision in ("main", "main", commit):
        assert resolve(REPO, revision, access).commit == commit
    assert len(hub.requests) == 1
    resolve(REPO, "main", Access())

    assert len(hub.requests) == 2


def test_an_answer_without_a_commit_is_reported(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = SimpleNamespace(id=REPO, sha=None, siblings=[], private=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: answer)

    with pytest.raises(HubUnavailableError, match=r"answer .* is invalid"):
        resolve(REPO, "main", Access())


@in_every_way
def test_every_file_is_asked_for_once_and_the_branch_is_noted(hub: Hub, commit: str) -> None:
    access = Access()
    for name in ("config.json", "model.safetensors"):
        fetch(name, access)
    heads = [request.path for request in hub.requests if request.method == "HEAD"]
    hub.requests.clear()

    assert heads == [
        f"/{REPO}/resolve/main/config.json",
        f"/{REPO}/resolve/{commit}/model.safetensors",
    ]
    assert fetch("model.safetensors", OFFLINE).read_bytes() == WEIGHTS
    assert hub.requests == []


@in_every_way
def test_cached_files_are_not_requested_again(hub: Hub, commit: str) -> None:
    first = fetch("model.safetensors")
    hub.requests.clear()

    assert fetch("model.safetensors") == first
    assert hub.request_lines == [f"GET /api/models/{REPO}/revision/main"]


def test_files_that_a_newer_commit_shares_are_not_fetched_again(hub: Hub, commit: str) -> None:
    fetch("model.safetensors")
    newer = hub.commit(REPO, {"config.json": b"{}"})
    hub.requests.clear()
    path = fetch("model.safetensors")

    assert newer in path.parts
    assert hub.request_lines == [
        f"GET /api/models/{REPO}/revision/main",
        f"HEAD /{REPO}/resolve/main/model.safetensors",
    ]
    assert newer in fetch("model.safetensors", OFFLINE).parts


def test_a_branch_that_was_cached_by_its_commit_is_noted_too(hub: Hub, commit: str) -> None:
    access = Access()
    first = download(resolve(REPO, commit, access), "model.safetensors", access)
    with pytest.raises(AccessError, match="is not in the cache"):
        fetch("model.safetensors", OFFLINE)

    assert fetch("model.safetensors") == first
    assert fetch("model.safetensors", OFFLINE) == first


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_branch_that_moves_meanwhile_gives_the_commit_that_was_looked_up(
    hub: Hub, commit: str, name: str
) -> None:
    access = Access()
    found = resolve(REPO, "main", access)
    newer = hub.commit(REPO, {name: b"something else"})
    hub.requests.clear()

    assert download(found, name, access).read_bytes() in (CONFIG, WEIGHTS)
    others = {"config.json", "model.safetensors"} - {name}
    download(found, others.pop(), access)
    heads = [request.path for request in hub.requests if request.method == "HEAD"]
    assert len(heads) == 3  # the first file by the branch, then both by the commit
    assert sum("/resolve/main/" in path for path in heads) == 1
    assert not any(newer in path for path in heads)


@pytest.mark.smoke  # of huggingface_hub
@over_lfs
def test_no_token_is_sent_to_the_storage_of_large_files(hub: Hub, commit: str) -> None:
    hub.add_user("ann", "hf_ann")
    fetch("model.safetensors", Access(token="hf_ann"))

    sent = {request.path.split("/")[1]: request.has_token for request in hub.requests}
    assert sent == {"api": True, "owner": True, "cdn": False}


@over_lfs
def test_the_client_goes_on_with_a_download_that_breaks_off(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # it keeps whole chunks only, of 10 MB
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.break_request(Truncated(70_000), method="GET", path="/cdn/")

    assert fetch("model.safetensors").read_bytes() == WEIGHTS
    assert [request.range for request in hub.requests if request.range] == ["bytes=70000-"]


# the cache alone -------------------------------------------------------------------------------


@in_every_way
def test_the_cache_has_the_digests_that_the_hub_gave(hub: Hub, commit: str) -> None:
    online = Access()
    for name in ("config.json", "model.safetensors"):
        fetch(name, online)
    expected = resolve(REPO, "main", online).digests

    assert resolve(REPO, "main", OFFLINE).digests == expected
    assert expected["model.safetensors"] == SHA256


def test_without_links_the_cache_has_no_digests(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_SYMLINKS", True)
    fetch("model.safetensors")

    assert resolve(REPO, "main", OFFLINE).digests == {"model.safetensors": None}


@pytest.mark.parametrize("revision", ["../../../secret", "/etc/passwd", "v1", "0" * 40])
def test_a_revision_that_is_not_in_the_cache_is_reported(
    hub: Hub, commit: str, tmp_path: Path, revision: str
) -> None:
    fetch("config.json")
    (tmp_path / "home" / "secret").write_text(commit)

    with pytest.raises(AccessError, match="only other revisions are"):
        resolve(REPO, revision, OFFLINE)


# damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_detected_by_its_digest(hub: Hub, commit: str, name: str) -> None:
    access = Access()
    path = fetch(name, access)
    digest = resolve(REPO, "main", access).digests[name]
    assert digest
    assert not is_damaged(path, digest)
    change_last_byte(path)

    assert is_damaged(path, digest)


def test_a_small_file_that_is_damaged_is_fetched_once_more(hub: Hub, commit: str) -> None:
    fetch("config.json").write_bytes(b'{"a": 2}')

    assert fetch("config.json").read_bytes() == CONFIG


def test_a_small_file_that_stays_damaged_is_refused_and_stays_in_the_cache(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    real: Callable[..., str] = huggingface_hub.hf_hub_download

    def damage(*arguments: Any, **keywords: Any) -> str:
        path = Path(real(*arguments, **keywords))
        path.write_bytes(b'{"a": 3}')
        fetched.append(path)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", damage)

    with pytest.raises(UnreadableFileError, match=r"config\.json of owner/name arrived") as caught:
        fetch("config.json")
    assert len(fetched) == 2
    assert f"stays in the cache, at {fetched[0]}" in caught.value.remedy
    assert fetched[0].is_file()


def test_a_small_file_without_a_digest_is_not_checked(hub: Hub, commit: str) -> None:
    access = Access()
    path = fetch("config.json", access)
    path.write_bytes(b'{"a": 2}')
    unknown = Snapshot(REPO, commit, commit, {"config.json": None})

    assert download(unknown, "config.json", access) == path


@in_every_way
def test_a_damaged_large_file_is_replaced_by_a_download(hub: Hub, commit: str) -> None:
    path = fetch("model.safetensors")
    change_last_byte(path)

    assert download_again(REPO, "model.safetensors", commit, Access()) == path
    assert path.read_bytes() == WEIGHTS


@in_every_way
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_replaced_where_there_are_no_links(
    hub: Hub, commit: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_SYMLINKS", True)
    path = fetch(name)
    assert not path.is_symlink()
    content = path.read_bytes()
    change_last_byte(path)

    assert fetch(name) == path
    assert path.read_bytes() == content


@in_every_way
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_named_where_only_the_cache_may_be_used(
    hub: Hub, commit: str, name: str
) -> None:
    change_last_byte(fetch(name))

    with pytest.raises(UnreadableFileError, match=f"{name} of {REPO} is damaged in the cache"):
        fetch(name, OFFLINE)


def test_a_file_that_the_cache_lacks_is_named_where_only_it_may_be_used(
    hub: Hub, commit: str
) -> None:
    fetch("config.json")

    with pytest.raises(AccessError, match=r"is not in the cache: model\.safetensors is missing"):
        fetch("model.safetensors", OFFLINE)


def test_a_damaged_file_that_cannot_be_replaced_is_named(
    hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch("model.safetensors")
    change_last_byte(path)

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(OutputError, match=f"{path} is damaged and cannot be replaced"):
        fetch("model.safetensors")


@over_xet
def test_a_damaged_file_in_a_shared_store_is_replaced_for_all_repositories(
    hub: Hub, commit: str
) -> None:
    hub.create_repo(OTHER, {"model.safetensors": WEIGHTS})
    mine, theirs = fetch("model.safetensors"), fetch("model.safetensors", repo_id=OTHER)
    assert mine.resolve() == theirs.resolve()
    assert mine.resolve().name != SHA256
    change_last_byte(mine)
    download_again(REPO, "model.safetensors", commit, Access())

    assert mine.read_bytes() == theirs.read_bytes() == WEIGHTS
