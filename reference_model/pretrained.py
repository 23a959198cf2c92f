"""Loading and saving: folders and Hub repositories with config.json and safetensors files."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin
from huggingface_hub.constants import (
    REPOCARD_NAME,
    SAFETENSORS_INDEX_FILE,
    SAFETENSORS_SINGLE_FILE,
)
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reference_model.config import EomtDinov3Config
from reference_model.files import fetch_file, open_regular, read_json_object, replacing

MODEL_CARD = """\
---
{{ card_data }}
---

An EoMT-DINOv3 segmentation model. `EomtDinov3ForUniversalSegmentation.from_pretrained` loads it,
in transformers and in the reference model of eomt-convert alike.
"""

# no folder, no way out of one, nothing that steers a terminal
_SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)

FLOATING_POINT = {"F64", "F32", "F16", "BF16"}  # safetensors' names


class EomtDinov3PreTrainedModel(
    nn.Module,
    ModelHubMixin,
    model_card_template=MODEL_CARD,
    library_name="transformers",
    pipeline_tag="image-segmentation",
    license="other",
    license_name="dinov3-license",
    license_link="https://ai.meta.com/resources/models-and-libraries/dinov3-license",
):
    """What models of this package share: from_pretrained, save_pretrained, push_to_hub.

    `from_pretrained` takes a folder or a Hub repository, the usual parameters (`revision`, `token`,
    `cache_dir`, `local_files_only`, `force_download`) and, besides:

        config: an EomtDinov3Config instead of the config.json that is there.
        dtype: of the weights, a torch.dtype or its name; by default, or "auto", as in the file.
        device: where the weights go; by default the CPU.

    It reads `model.safetensors`, or the shards of `model.safetensors.index.json`, never pickles.
    Every tensor goes straight into its place: nothing is initialised first. The model is in
    evaluation mode. A missing, unexpected or wrongly shaped tensor raises ValueError with its name.

    `save_pretrained` writes config.json, model.safetensors and, where there is none, README.md.
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
    def from_pretrained(  # type: ignore[override]  # refuses keywords it does not know
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
        """Loads a model; the class tells of the parameters.

        ModelHubMixin's own would read config.json itself, whatever that is and however large.

        Raises:
            OSError: a file is missing, or no regular file.
            ValueError: config.json is not sound, or the weights do not fit it.
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
            config = EomtDinov3Config.from_file(fetch("config.json"))
        with torch.device("meta"):
            model = cls(config)
        files = _weight_files(model_id, fetch)
        state = _read(files, model.state_dict(), _torch_dtype(dtype), str(device))
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        dtype = str(self.dtype).removeprefix("torch.")
        extra = {"architectures": [type(self).__name__], **self.config.extra, "dtype": dtype}
        replace(self.config, extra=extra).save_pretrained(save_directory)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        # the weights may still be mapped from the file that is replaced
        with replacing(save_directory / SAFETENSORS_SINGLE_FILE) as unfinished:
            save_file(state, unfinished, metadata={"format": "pt"})
        card = save_directory / REPOCARD_NAME
        if card.is_symlink() and not card.exists():
            card.unlink()  # ModelHubMixin would write to where the link leads


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is no floating point type of torch")
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
            "other formats of weights are not read"
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
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
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
            open_regular(path).close()  # safe_open waits for pipes
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device=device))
            except (SafetensorError, FileNotFoundError) as error:
                raise type(error)(f"{path}: {error}") from error
            for name in file.keys():  # noqa: SIM118
                if name in source:
                    raise ValueError(f"{path}: {name} is in another shard as well")
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
