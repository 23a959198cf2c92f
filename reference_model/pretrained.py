"""Loading and saving: folders and Hub repositories with config.json and safetensors files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.constants import (
    CONFIG_NAME,
    REPOCARD_NAME,
    SAFETENSORS_INDEX_FILE,
    SAFETENSORS_SINGLE_FILE,
)
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reference_model.config import EomtDinov3Config
from reference_model.files import (
    SHARD_NAME,
    fetch_file,
    open_regular,
    read_json_object,
    replacing,
)

MODEL_CARD = """\
---
library_name: transformers
license: other
license_name: dinov3-license
license_link: https://ai.meta.com/resources/models-and-libraries/dinov3-license
pipeline_tag: image-segmentation
---

An EoMT-DINOv3 segmentation model. `EomtDinov3ForUniversalSegmentation.from_pretrained` loads it,
in transformers and in the reference model of eomt-convert alike.
"""

FLOATING_POINT = {"F64", "F32", "F16", "BF16"}  # safetensors' names


class EomtDinov3PreTrainedModel(nn.Module):
    """A model with a config that can be loaded, saved and published.

    Attributes:
        config: the sizes of the model.
    """

    def __init__(self, config: EomtDinov3Config) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        config: EomtDinov3Config | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Loads a model in evaluation mode from a folder or a Hub repository.

        It reads `model.safetensors`, or the shards of `model.safetensors.index.json`, never
        pickles. Every tensor goes straight to its place: nothing is initialised first.

        Args:
            pretrained_model_name_or_path: a folder, or a repository's id.
            revision: branch, tag or commit of the repository.
            token: for the Hub; by default the one that is logged in.
            cache_dir: where downloads are kept; by default the Hub's cache.
            local_files_only: whether to use only that cache.
            force_download: whether to download files that are in the cache.
            config: used in place of the config.json that is there.
            dtype: of the weights, a torch.dtype or its name; by default, or "auto", as in the file.
            device: where the weights go.

        Raises:
            OSError: a file is missing, or is not a regular file.
            ValueError: a value in config.json cannot work, or a tensor is missing, unexpected or of
                the wrong shape; names it.
        """
        model_id = str(pretrained_model_name_or_path)
        fetch = partial(
            fetch_file,
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        if config is None:
            config = EomtDinov3Config.from_file(fetch(CONFIG_NAME))
        with torch.device("meta"):
            model = cls(config)
        files = _weight_files(model_id, fetch)
        state = _read(files, model.state_dict(), _torch_dtype(dtype), str(device))
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes config.json, model.safetensors and, if there is none, README.md into a folder.

        Args:
            save_directory: the folder, which is made if need be. Files of these names are replaced
                as a whole; links in their places are replaced too, and not followed.

        Raises:
            OSError: a file cannot be written.
        """
        folder = Path(save_directory)
        dtype = str(self.dtype).removeprefix("torch.")
        extra = {"architectures": [type(self).__name__], **self.config.extra, "dtype": dtype}
        replace(self.config, extra=extra).save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        # the weights may still be mapped from the file that is replaced
        with replacing(folder / SAFETENSORS_SINGLE_FILE) as unfinished:
            save_file(state, unfinished, metadata={"format": "pt"})
        if not (folder / REPOCARD_NAME).exists():
            with replacing(folder / REPOCARD_NAME) as unfinished:
                unfinished.write_text(MODEL_CARD, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        commit_message: str = "Upload model",
        private: bool | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Publishes the files of `save_pretrained` as one commit to a model repository.

        A README.md that the repository has stays. `eomt-convert push` publishes a checked model,
        with its verdict, licence and model card.

        Args:
            repo_id: owner/name; made if it does not exist.
            revision: branch to commit to; by default main.
            commit_message: first line of the commit.
            private: who sees a new repository; by default as its owner has set.
            create_pr: whether to open a pull request instead.
            token: for the Hub; by default the one that is logged in.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        there = api.file_exists(repo_id, REPOCARD_NAME, revision=revision)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
                ignore_patterns=[REPOCARD_NAME] if there else None,
            )


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; expected a floating point dtype of torch")
    return found


def _weight_files(model_id: str, fetch: Callable[[str], Path]) -> list[Path]:
    """The one file of weights, or the shards that an index names."""
    single = _fetch_if_there(SAFETENSORS_SINGLE_FILE, fetch)
    if single is not None:
        return [single]
    index = _fetch_if_there(SAFETENSORS_INDEX_FILE, fetch)
    if index is None:
        raise FileNotFoundError(
            f"{model_id} has neither {SAFETENSORS_SINGLE_FILE} nor {SAFETENSORS_INDEX_FILE}; "
            "other formats of weights are unsupported"
        )
    return [fetch(name) for name in _shard_names(index)]


def _fetch_if_there(name: str, fetch: Callable[[str], Path]) -> Path | None:
    try:
        path = fetch(name)
    except EntryNotFoundError:
        return None
    return path if path.is_file() else None


def _shard_names(index: Path) -> list[str]:
    try:
        names = set(read_json_object(index)["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors shards") from error
    for name in names:
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ValueError(
                f"{index}: {shortened(name)} is not the plain name of a safetensors file"
            )
    return sorted(names)


def _read(
    paths: list[Path], expected: dict[str, Tensor], dtype: torch.dtype | None, device: str
) -> dict[str, Tensor]:
    """The tensors of `expected`, all of them and no others, out of safetensors files."""
    with ExitStack() as stack:
        source: dict[str, safe_open] = {}
        for path in paths:
            open_regular(path).close()  # safe_open would wait for a pipe
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device=device))
            except (SafetensorError, FileNotFoundError) as error:
                raise type(error)(f"{path}: {error}") from error
            for name in file.keys():  # noqa: SIM118
                if name in source:
                    raise ValueError(f"{path}: {name} is in another shard too")
                source[name] = file

        problems = [f"missing: {name}" for name in sorted(expected.keys() - source.keys())]
        problems += [f"unexpected: {name}" for name in sorted(source.keys() - expected.keys())]
        for name in sorted(expected.keys() & source.keys()):
            stored: Any = source[name].get_slice(name)
            wanted = tuple(expected[name].shape)
            if tuple(stored.get_shape()) != wanted:
                problems.append(f"shape {tuple(stored.get_shape())} instead of {wanted}: {name}")
            elif stored.get_dtype() not in FLOATING_POINT:
                problems.append(f"dtype {stored.get_dtype()} instead of floating point: {name}")
        if problems:
            raise ValueError(
                f"{paths[0].parent}: the weights do not fit the model of config.json:\n  "
                + "\n  ".join(problems)
            )
        return {name: file.get_tensor(name).to(dtype) for name, file in source.items()}
