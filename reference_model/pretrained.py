"""Loading and saving: folders and Hub repositories with config.json and safetensors files."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self, TypeAlias, overload

import torch
from huggingface_hub import CommitInfo, HfApi, split_torch_state_dict_into_shards
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

from reference_model.allowed import refusal
from reference_model.config import EomtDinov3Config
from reference_model.files import (
    SHARD_NAME,
    fetch_file,
    json_text,
    open_regular,
    read_json_object,
    replacing,
)
from reference_model.loss import SetCriterion

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
ATTN_IMPLEMENTATIONS = ("sdpa", "eager")
CLASS_HEAD = ("class_predictor.weight", "class_predictor.bias", "criterion.empty_weight")
# files of weights that save_pretrained writes, here and in transformers
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

Mismatch: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...]]  # name, stored shape, expected

logger = logging.getLogger(__name__)


class EomtDinov3PreTrainedModel(nn.Module):
    """A model with a config that can be loaded, saved and published.

    Attributes:
        config: the sizes of the model.
        attn_implementation: how attention is computed, "sdpa" or "eager".
    """

    def __init__(self, config: EomtDinov3Config, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        if attn_implementation not in ATTN_IMPLEMENTATIONS:
            expected = '"sdpa", which uses flash attention where torch can, or "eager"'
            raise refusal("attn_implementation", attn_implementation, expected)
        self.config = config
        self.attn_implementation = attn_implementation

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters; buffers do not count."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        output_loading_info: Literal[True],
        **_: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **_: Any) -> Self: ...

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
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        device_map: str | torch.device | int | Mapping[str, Any] | None = None,
        attn_implementation: str = "sdpa",
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **settings: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
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
            torch_dtype: an old name of `dtype`.
            device: where the weights go; by default the CPU.
            device_map: another name of `device`, where "auto" is the accelerator, if there is one.
            attn_implementation: "sdpa" or "eager".
            ignore_mismatched_sizes: whether a class head for another number of classes than the
                file's is accepted. It gets new values, as in the original, and a warning names its
                tensors.
            output_loading_info: whether to return a tuple of the model and a dict, whose
                `mismatched_keys` has the name and both shapes of every such tensor.
            settings: attributes that replace those of the config, such as `num_labels`, `id2label`
                and `stuff_classes`; see `EomtDinov3Config.from_dict`.

        Raises:
            OSError: a file is missing, or is not a regular file.
            ValueError: a value in config.json or an argument cannot work, or a tensor is missing,
                unexpected or of the wrong shape; names it.
            TypeError: the config has no such attribute.
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
        if torch_dtype is not None:
            logger.warning("`torch_dtype` is deprecated! Use `dtype` instead!")
            dtype = torch_dtype if dtype is None else dtype
        if config is None:
            config = EomtDinov3Config.from_file(fetch(CONFIG_NAME), **settings)
        elif settings:
            config = EomtDinov3Config.from_dict(config.to_dict(), **settings)
        with torch.device("meta"):
            model = cls(config, attn_implementation)
        files = _weight_files(model_id, fetch)
        replaceable = CLASS_HEAD if ignore_mismatched_sizes else ()
        state, mismatched = _read(
            files, model.state_dict(), _torch_dtype(dtype), _device(device, device_map), replaceable
        )
        if mismatched:
            new = _new_class_head(config)
            state |= {name: new[name].to(state[name]) for name, _, _ in mismatched}
            logger.warning(
                "%s from %s: newly initialized, because the sizes do not match (MISMATCH); train "
                "before use:\n%s",
                cls.__name__,
                model_id,
                "\n".join(
                    f"  {name}: {old} in the checkpoint, {own} in the model"
                    for name, old, own in mismatched
                ),
            )
        model.load_state_dict(state, assign=True)
        if output_loading_info:
            keys: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set()}
            return model.eval(), {**keys, "mismatched_keys": set(mismatched), "error_msgs": []}
        return model.eval()

    def save_pretrained(
        self, save_directory: str | Path, max_shard_size: int | str = "50GB"
    ) -> None:
        """Writes config.json, model.safetensors and, if there is none, README.md into a folder.

        Args:
            save_directory: the folder, which is made if need be. Files of these names are replaced
                as a whole; links in their places are replaced too, and not followed. Other files of
                weights, which an earlier model left there, are deleted.
            max_shard_size: bytes of tensors in one file, or a size such as "2GB". A larger model is
                written as shards and model.safetensors.index.json, as transformers does.

        Raises:
            OSError: a file cannot be written.
            ValueError: the size is not one.
        """
        folder = Path(save_directory)
        dtype = str(self.dtype).removeprefix("torch.")
        extra = {"architectures": [type(self).__name__], **self.config.extra, "dtype": dtype}
        replace(self.config, extra=extra).save_pretrained(folder)
        self._save_weights(folder, max_shard_size)
        if not (folder / REPOCARD_NAME).exists():
            with replacing(folder / REPOCARD_NAME) as unfinished:
                unfinished.write_text(MODEL_CARD, encoding="utf-8")

    def _save_weights(self, folder: Path, max_shard_size: int | str) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
        files = [*split.filename_to_tensors]
        with TemporaryDirectory(prefix=".", dir=folder) as unfinished:
            # all of them before any is replaced: the weights may still be mapped from there
            for file, names in split.filename_to_tensors.items():
                tensors = {name: state[name] for name in names}
                save_file(tensors, Path(unfinished, file), metadata={"format": "pt"})
            if split.is_sharded:
                files.append(SAFETENSORS_INDEX_FILE)  # last, when the shards are there
                metadata = {"total_parameters": self.num_parameters(), **split.metadata}
                index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
                Path(unfinished, files[-1]).write_text(json_text(index), encoding="utf-8")
            # shards of two models would be taken for one; a single file is replaced as a whole
            kept = [] if split.is_sharded else files
            for path in folder.iterdir():
                if WEIGHT_FILE.fullmatch(path.name) and path.name not in kept:
                    path.unlink()
            for file in files:
                Path(unfinished, file).replace(folder / file)

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


def _device(
    device: str | torch.device | None,
    device_map: str | torch.device | int | Mapping[str, Any] | None,
) -> str:
    """The one device of a model."""
    if device_map is None:
        return str(device or "cpu")
    if device is not None:
        raise ValueError("device and device_map are names of one argument; expected one of them")
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]  # transformers' way to put all modules on one device
    if device_map == "auto":
        return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        return str(torch.device(device_map))  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as error:
        expected = 'one device for the whole model, such as "cpu" or "cuda:0", or "auto"'
        raise refusal("device_map", device_map, expected) from error


def _new_class_head(config: EomtDinov3Config) -> dict[str, Tensor]:
    """The tensors of CLASS_HEAD, as the original initialises them.

    Sources: github.com/tue-mps/eomt models/eomt.py (`class_head`, an nn.Linear with torch's own
    initialisation) and training/mask_classification_loss.py (`empty_weight`).
    """
    predictor = nn.Linear(config.hidden_size, config.num_labels + 1)
    new = (predictor.weight.detach(), predictor.bias.detach(), SetCriterion(config).empty_weight)
    return dict(zip(CLASS_HEAD, new, strict=True))


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
    paths: list[Path],
    expected: dict[str, Tensor],
    dtype: torch.dtype | None,
    device: str,
    replaceable: Container[str],
) -> tuple[dict[str, Tensor], list[Mismatch]]:
    """The tensors of `expected`, all of them and no others, out of safetensors files.

    Those of `replaceable` may have another shape; they are listed.
    """
    mismatched: list[Mismatch] = []
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
            shape, wanted = tuple(stored.get_shape()), tuple(expected[name].shape)
            if stored.get_dtype() not in FLOATING_POINT:
                problems.append(f"dtype {stored.get_dtype()} instead of floating point: {name}")
            elif shape != wanted:
                mismatched.append((name, shape, wanted))
        problems += [
            f"shape {shape} instead of {wanted}: {name}"
            for name, shape, wanted in mismatched
            if name not in replaceable
        ]
        if problems:
            hint = (
                "\nignore_mismatched_sizes=True gives the class head new values, to be trained"
                if any(name in CLASS_HEAD and name not in replaceable for name, _, _ in mismatched)
                else ""
            )
            raise ValueError(
                f"{paths[0].parent}: the weights do not fit the model of config.json:\n  "
                + "\n  ".join(problems)
                + hint
            )
        state = {name: file.get_tensor(name).to(dtype) for name, file in source.items()}
    return state, mismatched
