"""Files of a Hub repository in huggingface_hub's cache: fetched by the client, checked here.

The client checks only sizes and, for files from Xet, the hashes of that storage. This module checks
that a file has the digest that the repository lists. The layout of the cache is documented at
https://huggingface.co/docs/huggingface_hub/guides/manage-cache: refs/BRANCH holds a commit, and
snapshots/COMMIT/NAME links to a blob that is named by the file's digest. That blob may itself be a
link to a store that repositories share, where files have other names.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from converter.errors import AccessError, OutputError, UnreadableFileError
from converter.files import open_regular, sha256
from converter.hub.access import Access, Snapshot, explained, invalid_answer

_SHA256, _GIT_ID = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


def look_up(repo_id: str, revision: str, token: str | bool | None = None) -> Snapshot:
    """Asks the Hub for the files of a repository at a branch, tag or commit.

    Raises:
        AccessError, HubUnavailableError: as in `explained`.
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
        raise invalid_answer(repo_id)
    digests = {name: _as_digest(digest) for name, digest in listed.items()}
    moved_to = info.id if info.id != repo_id else None
    return Snapshot(repo_id, revision, commit, digests, bool(info.private), moved_to)


def resolve(repo_id: str, revision: str, access: Access) -> Snapshot:
    """Finds the files of a repository at a revision: in the cache, or by one request per command.

    Raises:
        AccessError: the revision is not in the cache, and only the cache may be used.
        AccessError, HubUnavailableError: as in `explained`.
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
    """Fetches one file of a repository into the cache, unless it is there already.

    Args:
        snapshot: the repository, which has this file.
        name: of the file.
        access: how the Hub is reached.
        check: whether to compare the file's digest with the Hub's, which reads the whole file; not
            needed if the caller computes the digest later anyway.

    Raises:
        AccessError: the file is not in the cache, and only the cache may be used.
        AccessError, HubUnavailableError: as in `explained`.
        UnreadableFileError: the file arrived damaged twice, or it is damaged in the cache and only
            the cache may be used.
    """
    find = _find_in_cache if access.offline else _fetch_missing
    path = find(snapshot, name, access)
    digest = snapshot.digests.get(name)
    if check and digest and is_damaged(path, digest):
        path = download_again(snapshot.repo_id, name, snapshot.commit, access)
        if is_damaged(path, digest):
            raise arrived_damaged(snapshot.repo_id, name, path)
    return path


def download_again(repo_id: str, name: str, commit: str, access: Access) -> Path:
    """Replaces a file that is damaged in the cache: fetches it once more.

    Raises:
        UnreadableFileError: only the cache may be used.
        OutputError: the cache cannot be written to.
        AccessError, HubUnavailableError: as in `explained`.
    """
    from huggingface_hub import hf_hub_download

    if access.offline:
        raise damaged_in_cache(repo_id, name)
    path = _repository_folder(repo_id, access) / "snapshots" / commit / name
    try:
        with explained(repo_id, commit):
            if path.is_file() and not path.is_symlink():
                path.unlink()  # the client replaces the target of a link, but not a regular file
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
            "Ask somebody who may write to that cache to delete the file, or give another cache "
            "with --cache-dir.",
        ) from error


def is_sha256(digest: str | None) -> TypeGuard[str]:
    """Whether a digest is a SHA-256, as the Hub gives it for large files."""
    return digest is not None and bool(_SHA256.fullmatch(digest))


def is_damaged(path: Path, digest: str) -> bool:
    """Whether a file's digest (SHA-256 or git's blob id) differs from this one; reads all of it."""
    if is_sha256(digest):
        return sha256(path) != digest
    with open_regular(path) as file:
        size = path.stat().st_size
        return hashlib.file_digest(file, lambda: blob_hash(size)).hexdigest() != digest


def blob_hash(size: int) -> "hashlib._Hash":
    """A hash that gives git's blob id once it is updated with a file's ``size`` bytes."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def arrived_damaged(repo_id: str, name: str, path: Path) -> UnreadableFileError:
    """The error for a file that was fetched twice and was damaged both times."""
    return UnreadableFileError(
        f"{name} of {repo_id} arrived damaged twice: its digest differs from the Hub's.",
        f"The damaged file stays in the cache, at {path}; the next run fetches it again. Try "
        "another connection, or one without a proxy.",
    )


def damaged_in_cache(repo_id: str, name: str) -> UnreadableFileError:
    """The error for a file that is damaged in the cache if only the cache may be used."""
    return UnreadableFileError(
        f"{name} of {repo_id} is damaged in the cache: its digest differs from the Hub's.",
        "Run once with a connection, to fetch it again.",
    )


def not_in_cache(repo_id: str, revision: str, reason: str) -> AccessError:
    """The error for a file or revision that the cache lacks if only the cache may be used."""
    return AccessError(
        f"{repo_id} at {revision} is not in the cache: {reason}.",
        "Run once with a connection, without --offline and HF_HUB_OFFLINE.",
    )


def _fetch_missing(snapshot: Snapshot, name: str, access: Access) -> Path:
    """Finds a file in the cache, or lets the client download it into the cache.

    The client writes down the commit of a branch only when it is asked for a file by the branch's
    name, and runs without a connection need this note. So the first file is asked for by the
    branch's name, unless the note is there and right.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo_id, revision, commit = snapshot.repo_id, snapshot.revision, snapshot.commit
    asked_by_branch = access.answers.asked_by_branch
    if (repo_id, revision) in asked_by_branch or _noted_commit(repo_id, revision, access) == commit:
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


def _find_in_cache(snapshot: Snapshot, name: str, access: Access) -> Path:
    path = _repository_folder(snapshot.repo_id, access) / "snapshots" / snapshot.commit / name
    if not path.is_file():
        raise not_in_cache(snapshot.repo_id, snapshot.revision, f"{name} is missing")
    return path


def _look_up_in_cache(repo_id: str, revision: str, access: Access) -> Snapshot:
    """The files of a repository at a branch, tag or commit that are in the cache.

    Raises:
        AccessError: the revision is not in the cache.
    """
    place = _repository_folder(repo_id, access)
    commit = _noted_commit(repo_id, revision, access)
    folder = place / "snapshots" / commit
    if not (_GIT_ID.fullmatch(commit) and folder.is_dir()):
        others = (place / "snapshots").is_dir()
        reason = "only other revisions are" if others else "no file of this repository is"
        raise not_in_cache(repo_id, revision, reason)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): _linked_digest(path) for path in files}
    if answer := access.answers.snapshots.get((repo_id, commit)):
        digests = {name: answer.digests.get(name) for name in digests}
    return Snapshot(repo_id, revision, commit, digests)


def _noted_commit(repo_id: str, revision: str, access: Access) -> str:
    """The commit that the cache notes for a branch or tag; anything else is returned unchanged."""
    names = revision.split("/")
    ref = (_repository_folder(repo_id, access) / "refs").joinpath(*names)
    if ".." in names or not ref.is_file():
        return revision
    return ref.read_text(encoding="utf-8", errors="replace").strip()


def _linked_digest(path: Path) -> str | None:
    """The digest that the Hub gave for a cached file: the name of the blob that it links to."""
    return _as_digest(path.readlink().name) if path.is_symlink() else None


def _as_digest(text: str | None) -> str | None:
    return text if text and (_SHA256.fullmatch(text) or _GIT_ID.fullmatch(text)) else None


def _repository_folder(repo_id: str, access: Access) -> Path:
    return access.cache / f"models--{repo_id.replace('/', '--')}"
