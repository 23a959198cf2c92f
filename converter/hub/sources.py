"""Finds or downloads the files of a source: a file, a folder or a Hub repository."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from converter.errors import AccessError, UnreadableFileError
from converter.files import sha256
from converter.hub.access import Access, Snapshot
from converter.hub.downloads import (
    download,
    download_again,
    is_damaged,
    is_sha256,
    not_in_cache,
    resolve,
)
from converter.places import INDEX_SUFFIX, WEIGHT_SUFFIXES, HubSource, LocalSource
from converter.weights.tensorfiles import (
    USUAL_NAMES,
    choose_weights,
    missing_shard,
    shard_names,
)


@dataclass(frozen=True)
class Fetched:
    """The files of a source, on this machine.

    Attributes:
        weights: the file of weights.
        config: the config.json beside it, if there is one.
        repo_id: the repository they come from; None for local files.
        revision: its commit; None for local files.
        shards: the files that ``weights`` lists, if it is an index.
        digests: of its files, by name, as far as the Hub gives them: SHA-256 of large files, git's
            blob ids of small ones.
        moved_to: the repository's present name, if it is no longer ``repo_id``.
    """

    weights: Path
    config: Path | None
    repo_id: str | None = None
    revision: str | None = None
    shards: tuple[Path, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    moved_to: str | None = None

    @property
    def size(self) -> int:
        """Size of the weights in bytes."""
        return sum(path.stat().st_size for path in self.shards or (self.weights,))

    def damaged(self, suspect: Path) -> list[str]:
        """Names of its files of weights whose digest differs from the Hub's.

        Args:
            suspect: the only file that is checked; for an index, all its shards are.
        """
        parts = self.shards or (self.weights,)
        return [
            part.name
            for part in parts
            if suspect in (part, self.weights)
            and part.name in self.digests
            and is_damaged(part, self.digests[part.name])
        ]

    @property
    def title(self) -> str:
        """Its name in a sentence: the repository or the path of the file."""
        return self.repo_id or str(self.weights)


def fetch(
    source: LocalSource | HubSource,
    access: Access,
    *,
    beside: Sequence[str] = (),
    check_weights: bool = True,
) -> Fetched:
    """Finds a source's file of weights and its config.json; downloads files that are missing here.

    The digests of a repository's files are compared with the Hub's; a damaged file is fetched once
    more.

    Args:
        source: a file, a folder or a repository.
        access: how the Hub is reached.
        beside: other files to download from a repository, if it has them.
        check_weights: whether the digests of weights are compared with the Hub's; not needed if
            the caller computes them while it reads the weights.

    Raises:
        UnreadableFileError: a local file is missing, a folder has no file of weights or several, or
            a file of a repository is damaged and arrived damaged again.
        AccessError: a repository or a file in it is missing, gated, or not in the cache when only
            the cache may be used.
        HubUnavailableError: the Hub is down, cannot be reached, or asks to wait.
    """
    if isinstance(source, LocalSource):
        return _find(source.path)
    return _download(source, access, beside, check_weights=check_weights)


def fetch_config(source: LocalSource | HubSource, access: Access) -> Path | None:
    """Finds a source's config.json, without its weights; None if it has none.

    Raises:
        AccessError: a repository is missing, gated, or not in the cache when only the cache may be
            used.
    """
    if isinstance(source, LocalSource):
        folder = source.path if source.path.is_dir() else source.path.parent
        config = folder / "config.json"
        return config if config.is_file() else None

    return fetch_first(source, ("config.json",), access)


def fetch_first(source: HubSource, names: Sequence[str], access: Access) -> Path | None:
    """Fetches the first of these files that a repository has; None if it has none of them.

    Raises:
        AccessError, HubUnavailableError: as in `explained`.
    """
    found = resolve(source.repo_id, source.revision, access)
    name = next((name for name in names if name in found.digests), None)
    return download(found, name, access) if name else None


def fetched_already(source: LocalSource | HubSource | None, access: Access) -> Fetched | None:
    """The files that this command has fetched from a repository.

    Returns:
        None for local files, and if not all files were fetched.

    Raises:
        UnreadableFileError: a small file of it is damaged in the cache.
    """
    if not isinstance(source, HubSource):
        return None
    if known := access.answers.snapshots.get((source.repo_id, source.revision)):
        source = HubSource(source.repo_id, known.commit)
    try:
        return fetch(source, replace(access, local_files_only=True), check_weights=False)
    except AccessError:
        return None


def fetch_again(files: Sequence[tuple[Fetched, str]], access: Access) -> None:
    """Replaces files that are damaged in the cache: downloads them once more.

    Args:
        files: the source and the name of each.
        access: how the Hub is reached.

    Raises:
        UnreadableFileError: only the cache may be used.
        AccessError, HubUnavailableError: as in `explained`.
    """
    for found, name in files:
        download_again(found.title, name, str(found.revision), access)


def listed_digests(source: LocalSource | HubSource, access: Access) -> list[str]:
    """SHA-256 of a source's weights, without fetching them; empty if the Hub does not give it.

    Raises:
        UnreadableFileError: local weights cannot be read.
        AccessError, HubUnavailableError: the repository cannot be reached.
    """
    if isinstance(source, LocalSource):
        found = _find(source.path)
        return [sha256(path) for path in found.shards or (found.weights,)]
    listed = resolve(source.repo_id, source.revision, access).digests
    digest = listed.get(choose_weights(sorted(listed)) or "")
    return [digest] if is_sha256(digest) else []


def _find(path: Path) -> Fetched:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        name = choose_weights(names)
        if name is None:
            raise UnreadableFileError(_no_weights(str(path), names))
        path = path / name
    elif not path.exists():
        raise UnreadableFileError(f"There is no file or folder {path}.")
    config = path.parent / "config.json"
    return Fetched(path, config if config.is_file() else None, shards=_shards(path))


def _shards(weights: Path) -> tuple[Path, ...]:
    shards = tuple(weights.parent / name for name in _named_shards(weights))
    for shard in shards:
        if not shard.is_file():
            raise missing_shard(shard, weights)
    return shards


def _named_shards(weights: Path) -> Sequence[str]:
    return shard_names(weights) if weights.name.endswith(INDEX_SUFFIX) else ()


def _no_weights(place: str, names: Sequence[str]) -> str:
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    if weights:
        return f"{place} has several files of weights ({', '.join(weights[:5])}): give one of them."
    return f"{place} has no file of weights ({', '.join(USUAL_NAMES)} or another *.safetensors)."


def _download(
    source: HubSource, access: Access, beside: Sequence[str], *, check_weights: bool
) -> Fetched:
    found = resolve(source.repo_id, source.revision, access)
    name = choose_weights(sorted(found.digests))
    if name is None:
        raise _without_weights(found, access)

    # small files first, so that most errors come before gigabytes are fetched
    for other in beside:
        if other in found.digests:
            download(found, other, access)
    config = download(found, "config.json", access) if "config.json" in found.digests else None
    is_index = name.endswith(INDEX_SUFFIX)
    weights = download(found, name, access, check=check_weights or is_index)
    shards = _named_shards(weights)
    if missing := [shard for shard in shards if shard not in found.digests]:
        raise _without(found, ", ".join(missing), access)
    digests = {
        file: digest
        for file in ("config.json", name, *shards)
        if (digest := found.digests.get(file))
    }
    return Fetched(
        weights,
        config,
        source.repo_id,
        found.commit,
        tuple(download(found, shard, access, check=check_weights) for shard in shards),
        digests,
        found.moved_to,
    )


def _without_weights(found: Snapshot, access: Access) -> AccessError:
    """The error for a repository in which no file of weights can be chosen."""
    names = sorted(found.digests)
    if access.offline and not any(name.endswith(WEIGHT_SUFFIXES) for name in names):
        return _without(found, " or ".join(USUAL_NAMES), access)
    return AccessError(_no_weights(f"{found.repo_id} at {found.revision}", names))


def _without(found: Snapshot, missing: str, access: Access) -> AccessError:
    """The error for a file that a repository lacks, or that the cache lacks if offline."""
    if not access.offline:
        return AccessError(f"{found.repo_id} at {found.revision} lacks {missing}.")
    there = ", ".join(sorted(found.digests)) or "none"
    return not_in_cache(
        found.repo_id, found.revision, f"{missing} is missing (files in the cache: {there})"
    )
