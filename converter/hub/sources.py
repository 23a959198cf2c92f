"""From what a user names - a file, a folder, a Hub repository - to files on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from converter.errors import AccessError, UnreadableFileError, UsageError
from converter.hub.access import Access
from converter.hub.downloads import discard, download, hub_sha256, is_damaged, remember, resolve
from converter.weights.tensorfiles import WEIGHT_SUFFIXES, WEIGHTS, WEIGHTS_INDEX, shard_names

# the file names that weights are published under, the safer format first
_WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin")


@dataclass(frozen=True)
class LocalSource:
    """A file of weights, or a folder that has one."""

    path: Path


@dataclass(frozen=True)
class HubSource:
    """A model repository.

    Attributes:
        repo_id: owner/name.
        revision: branch, tag or commit.
    """

    repo_id: str
    revision: str = "main"


@dataclass(frozen=True)
class Fetched:
    """The files of a source, on this machine.

    Attributes:
        weights: the file of weights.
        config: the config.json beside it, if there is one.
        repo_id: the repository they come from; None for local files.
        revision: its commit; None for local files.
        shards: the files that ``weights`` is the index of, if it is one.
        digests: SHA-256 of its large files, where the Hub told it.
        moved_to: the repository's name today, where it is not ``repo_id`` any more.
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

    @property
    def title(self) -> str:
        """What to call it in a sentence: the repository or the path of the file."""
        return self.repo_id or str(self.weights)


def parse_source(text: str) -> LocalSource | HubSource:
    """Tells a path from a repository.

    What exists, is absolute, begins with ``.`` or ``~``, or ends like a weight file is a path.
    Anything else of the form owner/name, or owner/name@revision, is a repository.

    Raises:
        UsageError: it is neither.
    """
    path = Path(text).expanduser()
    if (
        path.exists()
        or path.is_absolute()
        or text.startswith((".", "~"))
        or text.endswith((*WEIGHT_SUFFIXES, ".index.json"))
    ):
        return LocalSource(path)
    repo_id, _, revision = text.partition("@")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")) or text.endswith("@"):
        raise UsageError(
            f"{text!r} is no file or folder here, and not of the form owner/name or "
            "owner/name@revision either."
        )
    return HubSource(repo_id, revision or "main")


def fetch(
    source: LocalSource | HubSource, access: Access, *, beside: Sequence[str] = ()
) -> Fetched:
    """Finds a source's file of weights and its config.json, downloading what is not here yet.

    Args:
        source: a file, a folder or a repository.
        access: how the Hub is reached.
        beside: other files to download from a repository, where it has them.

    Raises:
        UnreadableFileError: a local file is missing, or a folder has no weights or several.
        AccessError: a repository or a file in it is missing, gated, or not in the cache when only
            that may be used.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
    """
    return (
        _find(source.path) if isinstance(source, LocalSource) else _download(source, access, beside)
    )


def fetch_config(source: LocalSource | HubSource, access: Access) -> Path | None:
    """Finds a source's config.json, without its weights; None if it has none.

    Raises:
        AccessError: a repository is missing, gated, or not in the cache when only that may be used.
    """
    if isinstance(source, LocalSource):
        folder = source.path if source.path.is_dir() else source.path.parent
        config = folder / "config.json"
        return config if config.is_file() else None

    return fetch_first(source, ("config.json",), access)


def fetch_first(source: HubSource, names: Sequence[str], access: Access) -> Path | None:
    """Fetches the first of these files that a repository has; None if it has none of them.

    Raises:
        AccessError, HubUnavailableError: as `explained` tells.
    """
    if access.offline:
        _, paths = _cached_files(source, access)
        return next((paths[name] for name in names if name in paths), None)
    found = resolve(source.repo_id, source.revision, access)
    name = next((name for name in names if name in found.names), None)
    return download(source.repo_id, name, found.commit, access) if name else None


def _find(path: Path) -> Fetched:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        name = _choose_weights(names)
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
            raise UnreadableFileError(
                f"{shard} is missing, a shard that {weights.name} speaks of.",
                "Fetch or copy all the shards.",
            )
    return shards


def _named_shards(weights: Path) -> Sequence[str]:
    return shard_names(weights) if weights.name.endswith(".index.json") else ()


def _choose_weights(names: Sequence[str]) -> str | None:
    """The file of weights among a folder's files: one with a usual name, or the only one."""
    for usual in _WEIGHT_FILES:
        if usual in names:
            return usual
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES) and "/" not in name]
    return weights[0] if len(weights) == 1 else None


def _no_weights(place: str, names: Sequence[str]) -> str:
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    if weights:
        return f"{place} has several files of weights ({', '.join(weights[:5])}): name one of them."
    return f"{place} has no file of weights ({', '.join(_WEIGHT_FILES)} or another *.safetensors)."


def _download(source: HubSource, access: Access, beside: Sequence[str]) -> Fetched:
    if access.offline:
        return _find_in_cache(source, access)
    found = resolve(source.repo_id, source.revision, access)
    name = _choose_weights(found.names)
    if name is None:
        raise AccessError(_no_weights(f"{source.repo_id} at {source.revision}", found.names))

    def bring(name: str) -> Path:
        return download(source.repo_id, name, found.commit, access)

    for other in beside:
        if other in found.names:
            bring(other)
    weights = bring(name)
    config = bring("config.json") if "config.json" in found.names else None
    shards = tuple(bring(shard) for shard in _named_shards(weights))
    remember(source.repo_id, source.revision, found.commit, access)
    moved_to = found.repo_id if found.repo_id != source.repo_id else None
    return _fetched(source, found.commit, weights, config, shards, moved_to)


def _find_in_cache(source: HubSource, access: Access) -> Fetched:
    commit, paths = _cached_files(source, access)
    name = _choose_weights(sorted(paths))
    if name is None:
        raise _not_in_cache(source, "of its files only " + ", ".join(sorted(paths)))
    weights = paths[name]
    missing = [shard for shard in _named_shards(weights) if shard not in paths]
    if missing:
        raise _not_in_cache(source, f"all but {', '.join(missing)}")
    shards = tuple(paths[shard] for shard in _named_shards(weights))
    return _fetched(source, commit, weights, paths.get("config.json"), shards)


def _cached_files(source: HubSource, access: Access) -> tuple[str, dict[str, Path]]:
    """The commit of a revision, and its files, as far as they are in the cache.

    Raises:
        AccessError: nothing of it is.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(access.cache).repos
    except CacheNotFound:
        repositories = frozenset()
    found = [
        repository
        for repository in repositories
        if (repository.repo_type, repository.repo_id) == ("model", source.repo_id)
    ]
    for repository in found:
        for revision in repository.revisions:
            if source.revision in {revision.commit_hash, *revision.refs}:
                paths = {file.file_name: file.file_path for file in revision.files}
                return revision.commit_hash, paths
    raise _not_in_cache(source, "other revisions of it" if found else "nothing of it")


def _not_in_cache(source: HubSource, cached: str) -> AccessError:
    return AccessError(
        f"{source.repo_id} at {source.revision} is not in the cache: there is {cached}.",
        "Run once with a connection, without --offline and HF_HUB_OFFLINE.",
    )


def _fetched(
    source: HubSource,
    commit: str,
    weights: Path,
    config: Path | None,
    shards: tuple[Path, ...],
    moved_to: str | None = None,
) -> Fetched:
    digests = {path.name: hub_sha256(path) for path in (weights, *shards)}
    known = {name: digest for name, digest in digests.items() if digest}
    return Fetched(weights, config, source.repo_id, commit, shards, known, moved_to)


def discard_damaged(source: LocalSource | HubSource | None, access: Access) -> list[str]:
    """Deletes files of a repository from the cache that are not what the Hub says they are.

    Returns:
        Their names; empty for local files, and where nothing is in the cache.
    """
    if not isinstance(source, HubSource):
        return []
    try:
        _, paths = _cached_files(source, access)
    except AccessError:
        return []
    damaged = [name for name, path in sorted(paths.items()) if is_damaged(path)]
    for name in damaged:
        discard(paths[name])
    return damaged
