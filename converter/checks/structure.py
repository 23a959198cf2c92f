"""Reads a model's files, and checks that they are complete and agree with each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checks.evidence import Evidence
from converter.checks.pixels import Normalisation, read_normalisation
from converter.checks.verdict import Level
from converter.configs import DTYPES, PREPROCESSOR, coarsest, read_config
from converter.files import read_json_object
from converter.models import size_mismatch
from converter.weights.headers import TensorInfo
from converter.weights.merge import BUFFERS, round_to, sha256_of
from converter.weights.tensorfiles import find_weights, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from converter.weights.tensorfiles import Array
    from reference_model import EomtDinov3Config

# torch's names of the dtypes that weights may be rounded to, by safetensors' names
ROUNDED_DTYPES = {stored: name for name, stored in DTYPES.items() if name != "float32"}

# keys that must be the same in a backbone's config.json and a model's; the others are for training
_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "num_channels",
    "num_register_tokens",
    "hidden_act",
    "layer_norm_eps",
    "rope_theta",
    "use_gated_mlp",
    "query_bias",
    "key_bias",
    "value_bias",
    "proj_bias",
    "mlp_bias",
)


@dataclass(frozen=True)
class StoredModel:
    """The files of a model, read once.

    Attributes:
        folder: where the files are.
        config: the model's config.json.
        values: the content of config.json, unparsed.
        normalisation: how its preprocessor_config.json rescales and normalises pixels.
        tensors: shapes and dtypes of its tensors, by name.
        weights: the values of its tensors in float32; empty unless the network is run.
        digests: SHA-256 of its tensors.
        nonfinite: names of the tensors that hold NaN or infinity.
        misfits: sentences that say why no model can be built from the tensors.
        drawn: a sentence that says why its outputs are random; empty if they are not.
    """

    folder: Path
    config: "EomtDinov3Config"
    values: Mapping[str, Any]
    normalisation: Normalisation
    tensors: Mapping[str, TensorInfo]
    weights: "Mapping[str, Tensor]"
    digests: Mapping[str, str]
    nonfinite: tuple[str, ...]
    misfits: tuple[str, ...]
    drawn: str

    @property
    def rounded(self) -> dict[str, str]:
        """The dtype of every tensor that was rounded, ``bfloat16`` or ``float16``."""
        return {
            name: ROUNDED_DTYPES[info.dtype]
            for name, info in self.tensors.items()
            if info.dtype in ROUNDED_DTYPES
        }

    @property
    def rounded_to(self) -> str | None:
        """The coarsest of these dtypes; None if nothing was rounded."""
        return coarsest(self.rounded.values())


def read_model(folder: Path, *, keep: bool) -> StoredModel:
    """Reads the files of a model; its weights are kept in memory only if ``keep`` is set.

    Raises:
        UnreadableFileError: a file is missing or cannot be read.
    """
    import numpy as np
    import torch

    from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    path = find_weights(folder)
    values = read_config(folder / "config.json")
    config = EomtDinov3Config.from_dict(values)
    normalisation = read_normalisation(folder / PREPROCESSOR, config.num_channels)
    weights: dict[str, Tensor] = {}
    digests, nonfinite, drawn = {}, [], ""
    with open_tensors(path) as file:
        tensors = dict(file.tensors)
        for name, info in tensors.items():
            stored = file.read(name)
            # bfloat16 is read as float32: back to the stored bits
            bits = round_to(stored, "BF16") if info.dtype == "BF16" else stored
            digests[name] = sha256_of(bits)
            if stored.dtype.kind == "f" and not np.isfinite(stored).all():
                nonfinite.append(name)
            if name == "attn_mask_probs":
                drawn = _why_random(stored)
            if keep:
                weights[name] = torch.from_numpy(stored).float()
    with torch.device("meta"):
        needed = EomtDinov3ForUniversalSegmentation(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    return StoredModel(
        folder,
        config,
        values,
        normalisation,
        tensors,
        weights,
        digests,
        tuple(nonfinite),
        tuple(_misfits(tensors, shapes)),
        drawn,
    )


def read_weights(folder: Path) -> "Mapping[str, Tensor]":
    """The weights of a model in float32, for a model that was read without keeping them."""
    import torch

    with open_tensors(find_weights(folder)) as file:
        return {name: torch.from_numpy(file.read(name)).float() for name in file.tensors}


def _why_random(probabilities: "Array") -> str:
    """Why outputs are random with these probabilities of masked attention; empty if they are not.

    A mask is applied where a number drawn from 0 to 1 is below them (reference_model/model.py).
    """
    between = probabilities[(probabilities > 0) & (probabilities < 1)]
    if not between.size:
        return ""
    return (
        f"attn_mask_probs holds {between[0]:g}, expected 0 or 1: in between, masks are applied at "
        "random, so the outputs are random too."
    )


def _misfits(
    tensors: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Names the tensors that are missing, unexpected or of a wrong shape or dtype, in sentences."""
    for name, shape in shapes.items():
        if name not in tensors:
            yield f"{name} is missing."
        elif tensors[name].shape != shape:
            yield (
                f"{name} has the shape {list(tensors[name].shape)}, expected {list(shape)} by "
                "config.json."
            )
        elif not tensors[name].dtype.startswith(("F", "BF")):
            yield f"{name} has dtype {tensors[name].dtype}, expected floating point numbers."
    for name in tensors:
        if name not in shapes:
            yield f"{name} is unexpected: the model in config.json has no such tensor."


def check_structure(found: StoredModel, evidence: Evidence, *, allow_nonfinite: bool) -> Level:
    """Checks that a model's files are complete, finite and consistent."""
    problems = list(found.misfits)
    if not allow_nonfinite:
        problems += [f"{name} holds NaN or infinity." for name in found.nonfinite]
    problems += [found.drawn] if found.drawn else []
    problems += _disagreements(found, evidence)
    figures = {
        "tensors": len(found.tensors),
        "parameters": sum(info.size for name, info in found.tensors.items() if name not in BUFFERS),
        "dtypes": sorted({info.dtype for info in found.tensors.values()}),
        "stored": {
            name: {"dtype": info.dtype, "shape": list(info.shape)}
            for name, info in found.tensors.items()
        },
        "digests": dict(found.digests),
        "problems": problems,
    }
    return structure_level(problems, figures)


def structure_level(problems: Sequence[str], figures: Mapping[str, Any]) -> Level:
    """The level, which fails if there are problems."""
    if not problems:
        return Level("structure", "passed", figures=figures)
    more = f" {len(problems) - 1} more problems were found." if len(problems) > 1 else ""
    return Level("structure", "failed", problems[0] + more, figures)


def _disagreements(found: StoredModel, evidence: Evidence) -> Iterator[str]:
    """Says where the model's files contradict each other, or the backbone's config.json."""
    declared = _dtype_in(found.values)
    if declared not in (*DTYPES, "None"):
        yield f"dtype in config.json is {declared!r}, expected one of {', '.join(DTYPES)}."
    for name, info in found.tensors.items():
        if DTYPES.get(declared, info.dtype) != info.dtype:
            yield f"{name} has dtype {info.dtype}, config.json says {declared}."
            break
    labels, ids = found.config.label2id, found.values.get("label2id")
    if ids is not None and ids != labels and len(labels) == len(found.config.id2label):
        yield "label2id in config.json is not the inverse of its id2label."
    preprocessor = read_json_object(found.folder / PREPROCESSOR)
    trained, made = found.config.input_size, _size_in(preprocessor)
    if made and (mismatch := size_mismatch(trained, made)):
        yield mismatch
    task = evidence.history.task if evidence.history else None
    windows = preprocessor.get("do_split_image")
    if task and windows is not None and windows != (task == "semantic"):
        yield (
            f"do_split_image in preprocessor_config.json is {windows}, expected {not windows} for "
            f"{task} segmentation."
        )
    if evidence.backbone_config:
        for key in _SHARED:
            ours, theirs = (getattr(each, key) for each in (found.config, evidence.backbone_config))
            if ours != theirs:
                yield f"{key} in config.json is {ours}, the backbone's says {theirs}."


def _dtype_in(values: Mapping[str, Any]) -> str:
    return str(values.get("dtype") or values.get("torch_dtype"))


def dtype_of(values: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype that a config.json declares, or else the one that all tensors have."""
    if declared := DTYPES.get(_dtype_in(values)):
        return declared
    types = {info.dtype for info in tensors.values()}
    return types.pop() if len(types) == 1 else "F32"


def _size_in(preprocessor: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (height, width) that a preprocessor_config.json resizes to; None if it does not say."""
    size = preprocessor.get("size")
    if not isinstance(size, dict):
        return None
    height, width = (size.get(key) or size.get("shortest_edge") for key in ("height", "width"))
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None
