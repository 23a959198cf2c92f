"""From what a user names - a file, a folder, a Hub repository - to files on this machine."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from converter.errors import AccessError, EomtConvertError, UnreadableFileError, UsageError
from converter.tensorfiles import WEIGHT_SUFFIXES, WEIGHTS, WEIGHTS_INDEX, shard_names

# the file names that weights are published under, the safer format first
_WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin")


# the same weights in repositories that are not gated
OPEN_BACKBONES = {
    "facebook/dinov3-vits16-pretrain-lvd1689m": "timm/vit_small_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": "timm/vit_small_plus_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vitb16-pretrain-lvd1689m": "timm/vit_base_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vitl16-pretrain-lvd1689m": "timm/vit_large_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vitl16-pretrain-sat493m": "timm/vit_large_patch16_dinov3.sat493m",
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": "timm/vit_huge_plus_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": "timm/vit_7b_patch16_dinov3.lvd1689m",
    "facebook/dinov3-vit7b16-pretrain-sat493m": "timm/vit_7b_patch16_dinov3.sat493m",
}


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
class Access:
    """How the Hub is reached; parameters as in every function of huggingface_hub.

    Attributes:
        token: overrides HF_TOKEN and the login file.
        cache_dir: overrides HF_HOME and HF_HUB_CACHE.
        local_files_only: whether only the cache is used.
    """

    token: str | None = None
    cache_dir: Path | None = None
    local_files_only: bool = False


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
    """

    weights: Path
    config: Path | None
    repo_id: str | None = None
    revision: str | None = None
    shards: tuple[Path, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

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


def fetch(source: LocalSource | HubSource, access: Access) -> Fetched:
    """Finds a source's file of weights and its config.json, downloading what is not here yet.

    Raises:
        UnreadableFileError: a local file is missing, or a folder has no weights or several.
        AccessError: a repository or a file in it is missing, gated, or not in the cache when only
            that may be used.
    """
    return _find(source.path) if isinstance(source, LocalSource) else _download(source, access)


def fetch_config(source: LocalSource | HubSource, access: Access) -> Path | None:
    """Finds a source's config.json, without its weights; None if it has none.

    Raises:
        AccessError: a repository is missing, gated, or not in the cache when only that may be used.
    """
    if isinstance(source, LocalSource):
        folder = source.path if source.path.is_dir() else source.path.parent
        config = folder / "config.json"
        return config if config.is_file() else None

    if _offline(access):
        return _find_in_cache(source, access).config
    with _explained(source):
        if "config.json" in _list_files(source, access):
            return _download_file(source, "config.json", access)
    return None


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
    if not weights.name.endswith(".index.json"):
        return ()
    shards = tuple(weights.parent / name for name in shard_names(weights))
    for shard in shards:
        if not shard.is_file():
            raise UnreadableFileError(
                f"{shard} is missing, a shard that {weights.name} speaks of.",
                "Fetch or copy all the shards.",
            )
    return shards


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


def _offline(access: Access) -> bool:
    from huggingface_hub import constants

    return access.local_files_only or constants.HF_HUB_OFFLINE


def _list_files(source: HubSource, access: Access) -> list[str]:
    from huggingface_hub import HfApi

    info = HfApi(token=access.token).model_info(source.repo_id, revision=source.revision)
    return [sibling.rfilename for sibling in info.siblings or ()]


def _download_file(source: HubSource, name: str, access: Access) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.hf_hub_download(
            source.repo_id,
            name,
            revision=source.revision,
            token=access.token,
            cache_dir=access.cache_dir,
        )
    )


def _download(source: HubSource, access: Access) -> Fetched:
    if _offline(access):
        return _find_in_cache(source, access)
    with _explained(source):
        names = _list_files(source, access)
        name = _choose_weights(names)
        if name is None:
            raise AccessError(_no_weights(f"{source.repo_id} at {source.revision}", names))
        weights = _download_file(source, name, access)
        # The first download resolves the branch, and notes in the cache what it resolved to; the
        # rest comes from that very commit. The path is .../snapshots/COMMIT/NAME.
        pinned = HubSource(source.repo_id, weights.parent.name)
        config = _download_file(pinned, "config.json", access) if "config.json" in names else None
        shards: tuple[Path, ...] = ()
        if name.endswith(".index.json"):
            shards = tuple(_download_file(pinned, shard, access) for shard in shard_names(weights))
    return Fetched(
        weights, config, source.repo_id, pinned.revision, shards, _hub_digests((weights, *shards))
    )


def _hub_digests(paths: Sequence[Path]) -> dict[str, str]:
    """What the Hub says that the SHA-256 of files in its cache is.

    The client keeps a large file under the digest that the Hub gave for it, and does not check it.
    """
    blobs = {path.name: path.resolve().name for path in paths}
    return {name: blob for name, blob in blobs.items() if re.fullmatch("[0-9a-f]{64}", blob)}


def _find_in_cache(source: HubSource, access: Access) -> Fetched:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(access.cache_dir or constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        repositories = frozenset()
    for repository in repositories:
        if (repository.repo_type, repository.repo_id) != ("model", source.repo_id):
            continue
        for revision in repository.revisions:
            if source.revision in {revision.commit_hash, *revision.refs}:
                paths = {file.file_name: file.file_path for file in revision.files}
                weights = _choose_weights(sorted(paths))
                if weights is not None:
                    shards = _shards(paths[weights])
                    return Fetched(
                        paths[weights],
                        paths.get("config.json"),
                        source.repo_id,
                        revision.commit_hash,
                        shards,
                        _hub_digests((paths[weights], *shards)),
                    )
    raise AccessError(
        f"{source.repo_id} at {source.revision} is not in the cache, or its weights are not.",
        "Run once with a connection, without --offline and HF_HUB_OFFLINE.",
    )


@contextmanager
def _explained(source: HubSource) -> Iterator[None]:
    """Turns what huggingface_hub raises into a sentence and a remedy."""
    from huggingface_hub import errors

    repo, page = source.repo_id, f"https://huggingface.co/{source.repo_id}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except EomtConvertError:
        raise
    except errors.GatedRepoError as error:
        remedy = f"Ask for access at {page}, then {log_in}."
        if open_repo := OPEN_BACKBONES.get(repo):
            remedy += (
                f"\nOr take timm's copy, which is not gated: --backbone {open_repo}. DINOv3's "
                "licence holds for it and for the merged weights all the same."
            )
        raise AccessError(
            f"{repo} is gated, and this login has no access to it.", remedy
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise AccessError(
            f"There is no repository {repo}, or it is private and this login does not see it.",
            f"Check the name; for a private one, {log_in}.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AccessError(f"{repo} has no revision {source.revision!r}.") from error
    except errors.LocalEntryNotFoundError as error:
        raise AccessError(
            f"{repo} at {source.revision} is not in the cache, and the Hub did not answer.",
            "Check the connection and HF_ENDPOINT.",
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repo!r} is no valid name of a repository: {error}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise AccessError(
            f"The Hub refused {repo} with status {status}.",
            f"The token may have expired: {log_in}." if status == 401 else "Try again later.",
        ) from error
    except Exception as error:
        # huggingface_hub lets errors of its HTTP library through, and has changed that library
        if not isinstance(error, OSError) and not type(error).__module__.startswith("http"):
            raise
        raise AccessError(
            f"The Hub could not be reached for {repo}: {type(error).__name__}.",
            "Check the connection and HF_ENDPOINT; --offline uses the cache alone.",
        ) from error
