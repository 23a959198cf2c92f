"""Files of a Hub repository in huggingface_hub's cache: fetched, gone on with, checked.

The client deletes what a download brought when it breaks off, and checks sizes only. Here a large
file goes on where it stopped, in a later run too, and a file in the cache can be held against the
digest that the Hub gave for it, which is the name that the cache keeps it under
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

import hashlib
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from converter.errors import UnreadableFileError
from converter.hub.access import Access, explained

_SHA256, _GIT_BLOB_ID = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Snapshot:
    """What a repository has at a revision.

    Attributes:
        repo_id: its name today; the Hub answers to former names too.
        commit: which a branch or tag is at.
        names: of its files.
    """

    repo_id: str
    commit: str
    names: tuple[str, ...]


def resolve(repo_id: str, revision: str, access: Access) -> Snapshot:
    """Finds the commit that a branch or tag is at.

    Raises:
        AccessError, HubUnavailableError: as `explained` tells.
    """
    from huggingface_hub import HfApi

    with explained(repo_id, revision):
        info = HfApi(token=access.token).model_info(repo_id, revision=revision)
        names = tuple(sibling.rfilename for sibling in info.siblings or ())
        return Snapshot(info.id, str(info.sha), names)


def download(repo_id: str, name: str, commit: str, access: Access) -> Path:
    """Fetches one file into the cache, unless it is there.

    Raises:
        AccessError, HubUnavailableError: as `explained` tells.
        UnreadableFileError: a small file arrived damaged, twice. A large one is checked by whoever
            reads it.
    """
    with explained(repo_id, commit):
        path = _download(repo_id, name, commit, access)
        if _GIT_BLOB_ID.fullmatch(path.resolve().name) and is_damaged(path):
            discard(path)
            path = _download(repo_id, name, commit, access)
            if is_damaged(path):
                discard(path)
                raise arrived_damaged(name, repo_id)
        return path


def arrived_damaged(name: str, repo_id: str) -> UnreadableFileError:
    """What to say of a file that was fetched twice and is wrong."""
    return UnreadableFileError(
        f"{name} of {repo_id} arrived damaged twice: its digest is not the one that the Hub gives.",
        "It was deleted from the cache. Run again, over another connection or without a proxy.",
    )


def remember(repo_id: str, revision: str, commit: str, access: Access) -> None:
    """Notes in the cache which commit a branch or tag was at, for runs without a connection."""
    if revision != commit:
        ref = _folder(repo_id, access) / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="utf-8")


def hub_sha256(path: Path) -> str | None:
    """What the Hub says that the SHA-256 of a file in the cache is; None for a small file."""
    blob = path.resolve().name
    return blob if _SHA256.fullmatch(blob) else None


def is_damaged(path: Path) -> bool:
    """Whether a file in the cache is not what the Hub said it would be; reads all of it."""
    blob = path.resolve().name
    if _SHA256.fullmatch(blob):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() != blob
    if _GIT_BLOB_ID.fullmatch(blob):
        content = path.read_bytes()
        header = b"blob %d\0" % len(content)
        return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() != blob
    return False


def discard(path: Path) -> None:
    """Deletes a file from the cache, so that it will be fetched again."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _download(repo_id: str, name: str, commit: str, access: Access) -> Path:
    from huggingface_hub import hf_hub_download

    if not (_folder(repo_id, access) / "snapshots" / commit / name).exists():
        _download_large(repo_id, name, commit, access)
    return Path(
        hf_hub_download(
            repo_id, name, revision=commit, token=access.token, cache_dir=access.cache_dir
        )
    )


def _download_large(repo_id: str, name: str, commit: str, access: Access) -> None:
    """Puts a large file's content where `hf_hub_download` looks before it downloads.

    Small files, and those in Xet storage where the client has the library for it, are left to it.
    """
    from filelock import FileLock
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, no __all__

    url = hf_hub_url(repo_id, name, revision=commit)
    metadata = get_hf_file_metadata(url, token=access.token, retry_on_errors=True)
    digest, size = metadata.etag or "", metadata.size or 0
    xet = bool(metadata.xet_file_data) and not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet")
    if xet or not _SHA256.fullmatch(digest):
        return
    headers = build_hf_headers(token=access.token)
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # which is not for whoever stores the files
    folder = _folder(repo_id, access)
    blob = folder / "blobs" / digest
    partial = blob.with_name(f"{digest}.eomt-convert.incomplete")
    lock = access.cache / ".locks" / folder.name / f"{digest}.lock"
    for parent in (blob.parent, lock.parent):
        parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if blob.exists():
            return
        with partial.open("r+b" if partial.exists() else "w+b") as file:
            arrived = file.seek(0, os.SEEK_END)
            if arrived > size:  # of no use
                arrived = file.truncate(file.seek(0))
            while arrived < size:
                try:
                    http_get(
                        metadata.location,
                        file,
                        resume_size=arrived,
                        headers=headers,
                        expected_size=size,
                    )
                except Exception:
                    if file.tell() <= arrived:
                        raise
                arrived = file.tell()
        partial.replace(blob)


def _folder(repo_id: str, access: Access) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return access.cache / repo_folder_name(repo_id=repo_id, repo_type="model")
