"""Files of a Hub repository in huggingface_hub's cache: fetched by the client, checked here.

The client checks sizes, and over Xet the storage's own hashes; whether a file is the one that the
repository lists is checked here. The cache is laid out as its guide describes
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache): refs/BRANCH holds a commit, and
snapshots/COMMIT/NAME links to a blob that is named by the file's digest. That blob may be a link in
its turn, to a store that repositories share, where files have other names.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from converter.errors import AccessError, OutputError, UnreadableFileError
from converter.files import open_regular, sha256
from converter.hub.access import Access, Snapshot, explained, senseless_answer

_SHA256, _GIT_ID = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


def look_up(repo_id: str, revision: str, token: str | bool | None = None) -> Snapshot:
    """Asks the Hub what a repository has at a branch, tag or commit.

    Raises:
        AccessError, HubUnavailableError: as `explained` tells.
    """
    from huggingface_hub import HfApi

    with explained(repo_id, revision):
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    commit = str(info.sha)
    listed = {
        file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id
        for file in info.siblings or ()
    }
    texts = [*listed, *filter(None, listed.values())]
    if not _GIT_ID.fullmatch(commit) or not all(isinstance(text, str) for text in texts):
        raise senseless_answer(repo_id)
    digests = {name: _as_digest(digest) for name, digest in listed.items()}
    moved_to = info.id if info.id != repo_id else None
    return Snapshot(repo_id, revision, commit, digests, bool(info.private), moved_to)


def resolve(repo_id: str, revision: str, access: Access) -> Snapshot:
    """Finds what a repository has at a revision: asks the Hub once a command, or the cache.

    Raises:
        AccessError: it is not in the cache when only that may be used.
        AccessError, HubUnavailableError: as `explained` tells.
    """
    if access.offline:
        return _look_up_in_cache(repo_id, revision, access)
    known = access.answers.snapshots
    if (repo_id, revision) not in known:
        found = look_up(repo_id, revision, access.token)
        known[repo_id, revision] = found
        known[repo_id, found.commit] = replace(found, revision=found.commit)
    return known[repo_id, revision]


def download(snapshot: Snapshot, name: str, access: Access, *, check: bool = True) -> Path:
    """Fetches one file of a repository into the cache, unless it is there.

    Args:
        snapshot: the repository, which has this file.
        name: of the file.
        access: how the Hub is reached.
        check: whether to hold the file against its digest, which reads all of it; what is digested
            later anyway need not be.

    Raises:
        AccessError: it is not in the cache when only that may be used.
        AccessError, HubUnavailableError: as `explained` tells.
        UnreadableFileError: it arrived damaged twice, or is damaged where only the cache may be
            used.
    """
    path = _find(snapshot, name, access) if access.offline else _bring(snapshot, name, access)
    digest = snapshot.digests.get(name)
    if check and digest and is_damaged(path, digest):
        path = download_again(snapshot.repo_id, name, snapshot.commit, access)
        if is_damaged(path, digest):
            raise arrived_damaged(snapshot.repo_id, name, path)
    return path


def download_again(repo_id: str, name: str, commit: str, access: Access) -> Path:
    """Fetches a file that is damaged in the cache, in place of what is there.

    Raises:
        UnreadableFileError: only the cache may be used.
        OutputError: the cache cannot be written to.
        AccessError, HubUnavailableError: as `explained` tells.
    """
    from huggingface_hub import hf_hub_download

    if access.offline:
        raise damaged_in_cache(repo_id, name)
    path = _place(repo_id, access) / "snapshots" / commit / name
    try:
        with explained(repo_id, commit):
            if path.is_file() and not path.is_symlink():
                path.unlink()  # the client replaces what links lead to, and leaves other files
            return Path(
                hf_hub_download(
                    repo_id,
                    name,
                    revision=commit,
                    token=access.token,
                    cache_dir=access.cache,
                    force_download=True,
                )
            )
    except OutputError as error:
        raise OutputError(
            f"{path} is damaged and cannot be replaced: {error.message}",
            "Let somebody who may write to that cache delete the file, or give another with "
            "--cache-dir.",
        ) from error


def is_sha256(digest: str | None) -> TypeGuard[str]:
    """Whether a digest is SHA-256, as the Hub gives it for large files."""
    return digest is not None and bool(_SHA256.fullmatch(digest))


def is_damaged(path: Path, digest: str) -> bool:
    """Whether a file is not the one of a digest, SHA-256 or git's blob id; reads all of it."""
    if is_sha256(digest):
        return sha256(path) != digest
    with open_regular(path) as file:
        size = path.stat().st_size
        return hashlib.file_digest(file, lambda: blob_hash(size)).hexdigest() != digest


def blob_hash(size: int) -> "hashlib._Hash":
    """What git calls a content of so many bytes, once it is updated with those."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def arrived_damaged(repo_id: str, name: str, path: Path) -> UnreadableFileError:
    """What to say of a file that was fetched twice and is wrong."""
    return UnreadableFileError(
        f"{name} of {repo_id} arrived damaged twice: its digest is not the one that the Hub gives.",
        f"What arrived stays in the cache, as {path}; the next run fetches it again. Try another "
        "connection, or none of your proxies.",
    )


def damaged_in_cache(repo_id: str, name: str) -> UnreadableFileError:
    """What to say of a file that is wrong where only the cache may be used."""
    return UnreadableFileError(
        f"{name} of {repo_id} is damaged in the cache: its digest is not what the Hub told.",
        "Run once with a connection, to fetch it again.",
    )


def not_in_cache(repo_id: str, revision: str, reason: str) -> AccessError:
    """What to say where only the cache may be used and it has not what is needed."""
    return AccessError(
        f"{repo_id} at {revision} is not in the cache: {reason}.",
        "Run once with a connection, without --offline and HF_HUB_OFFLINE.",
    )


def _bring(snapshot: Snapshot, name: str, access: Access) -> Path:
    """Finds a file in the cache, or lets the client download it there.

    The client notes which commit a branch is at when it is asked for a file by the branch's name;
    runs without a connection need that. So it is asked that way once, unless the note is right.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo_id, revision, commit = snapshot.repo_id, snapshot.revision, snapshot.commit
    asked_by_branch = access.answers.asked_by_branch
    if (repo_id, revision) in asked_by_branch or _noted(repo_id, revision, access) == commit:
        revision = commit
    asked_by_branch.add((repo_id, revision))
    with explained(repo_id, revision):
        cached = try_to_load_from_cache(repo_id, name, cache_dir=access.cache, revision=commit)
    if isinstance(cached, str) and revision == commit:
        return Path(cached)
    # a branch may have moved since it was looked up
    for asked in dict.fromkeys((revision, commit)):
        with explained(repo_id, asked):
            path = Path(
                hf_hub_download(
                    repo_id, name, revision=asked, token=access.token, cache_dir=access.cache
                )
            )
        if path.parents[name.count("/")].name == commit:
            break
    return path


def _find(snapshot: Snapshot, name: str, access: Access) -> Path:
    path = _place(snapshot.repo_id, access) / "snapshots" / snapshot.commit / name
    if not path.is_file():
        raise not_in_cache(snapshot.repo_id, snapshot.revision, f"{name} is missing")
    return path


def _look_up_in_cache(repo_id: str, revision: str, access: Access) -> Snapshot:
    """What the cache has of a repository at a branch, tag or commit.

    Raises:
        AccessError: nothing.
    """
    place = _place(repo_id, access)
    commit = _noted(repo_id, revision, access)
    folder = place / "snapshots" / commit
    if not (_GIT_ID.fullmatch(commit) and folder.is_dir()):
        found = "other revisions of it" if (place / "snapshots").is_dir() else "nothing of it"
        raise not_in_cache(repo_id, revision, f"there is {found}")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): _linked_digest(path) for path in files}
    if told := access.answers.snapshots.get((repo_id, commit)):
        digests = {name: told.digests.get(name) for name in digests}
    return Snapshot(repo_id, revision, commit, digests)


def _noted(repo_id: str, revision: str, access: Access) -> str:
    """The commit that a branch or tag was at when it was last asked for; a commit is itself."""
    names = revision.split("/")
    ref = (_place(repo_id, access) / "refs").joinpath(*names)
    if ".." in names or not ref.is_file():
        return revision
    return ref.read_text(encoding="utf-8", errors="replace").strip()


def _linked_digest(path: Path) -> str | None:
    """What the Hub said that a file's digest is: the name of the blob that it links to."""
    return _as_digest(path.readlink().name) if path.is_symlink() else None


def _as_digest(text: str | None) -> str | None:
    return text if text and (_SHA256.fullmatch(text) or _GIT_ID.fullmatch(text)) else None


def _place(repo_id: str, access: Access) -> Path:
    return access.cache / f"models--{repo_id.replace('/', '--')}"
