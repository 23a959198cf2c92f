"""A model's files, read once, and whether they are a model's: complete, and of one mind."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checks.evidence import Evidence
from converter.checks.pixels import Normalisation, read_normalisation
from converter.checks.verdict import Level
from converter.configs import DTYPES, read_config
from converter.files import read_json_object
from converter.models import size_mismatch
from converter.weights.headers import TensorInfo
from converter.weights.merge import BUFFERS, round_to
from converter.weights.tensorfiles import find_weights, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from converter.weights.tensorfiles import Array
    from reference_model import EomtDinov3Config

# torch's names of the types that weights are rounded to, by safetensors'
ROUNDED_DTYPES = {stored: name for name, stored in DTYPES.items() if name != "float32"}

# What a backbone's config.json and a model's must have in common; the rest is for training.
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
        folder: where they are.
        config: its config.json.
        values: the same, as it stands there.
        normalisation: what its preprocessor_config.json does to pixels.
        tensors: shapes and types of its tensors, by name.
        weights: their values in float32; empty unless the network is run.
        digests: their SHA-256.
        nonfinite: names of those that hold NaN or infinity.
        misfits: in sentences, why no model can be built of them.
        drawn: in a sentence, why its outputs are random; empty if they are not.
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
        """The type of every tensor that was rounded, ``bfloat16`` or ``float16``."""
        return {
            name: ROUNDED_DTYPES[info.dtype]
            for name, info in self.tensors.items()
            if info.dtype in ROUNDED_DTYPES
        }

    @property
    def rounded_to(self) -> str | None:
        """The coarsest of these types; None if nothing was rounded."""
        types = set(self.rounded.values())
        return "bfloat16" if "bfloat16" in types else next(iter(types), None)


def read_model(folder: Path, *, keep: bool) -> StoredModel:
    import numpy as np
    import torch

    from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    path = find_weights(folder)
    values = read_config(folder / "config.json")
    config = EomtDinov3Config.from_dict(values)
    normalisation = read_normalisation(folder / "preprocessor_config.json", config.num_channels)
    weights: dict[str, Tensor] = {}
    digests, nonfinite, drawn = {}, [], ""
    with open_tensors(path) as file:
        tensors = dict(file.tensors)
        for name, info in tensors.items():
            stored = file.read(name)
            # bfloat16 comes widened: back to the bits that are stored
            bits = round_to(stored, "BF16") if info.dtype == "BF16" else stored
            digests[name] = hashlib.sha256(np.ascontiguousarray(bits).data).hexdigest()
            if stored.dtype.kind == "f" and not np.isfinite(stored).all():
                nonfinite.append(name)
            if name == "attn_mask_probs":
                drawn = _chance(stored)
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
    """The weights in float32, of a model whose network is not run."""
    import torch

    with open_tensors(find_weights(folder)) as file:
        return {name: torch.from_numpy(file.read(name)).float() for name in file.tensors}


def _chance(probabilities: "Array") -> str:
    """Why outputs are random with these probabilities of masked attention; empty if they are not.

    A mask is applied where a number drawn from 0 to 1 is below them (reference_model/model.py).
    """
    between = probabilities[(probabilities > 0) & (probabilities < 1)]
    if not between.size:
        return ""
    return (
        f"attn_mask_probs holds {between[0]:g}: between 0 and 1 it is drawn at random whether "
        "masks are applied, and so are the outputs."
    )


def _misfits(
    tensors: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """What keeps tensors from being the model of these shapes, a sentence each."""
    for name, shape in shapes.items():
        if name not in tensors:
            yield f"{name} is missing."
        elif tensors[name].shape != shape:
            yield (
                f"{name} has the shape {list(tensors[name].shape)}, config.json asks for "
                f"{list(shape)}."
            )
        elif not tensors[name].dtype.startswith(("F", "BF")):
            yield f"{name} holds {tensors[name].dtype}, not floating point numbers."
    for name in tensors:
        if name not in shapes:
            yield f"{name} is unknown: the model of config.json has no place for it."


def check_structure(found: StoredModel, evidence: Evidence, *, allow_nonfinite: bool) -> Level:
    problems = list(found.misfits)
    if not allow_nonfinite:
        problems += [f"{name} holds NaN or infinity." for name in found.nonfinite]
    problems += [found.drawn] if found.drawn else []
    problems += _disagreements(found, evidence)
    figures = {
        "tensors": len(found.tensors),
        "parameters": sum(info.size for name, info in found.tensors.items() if name not in BUFFERS),
        "dtypes": sorted({info.dtype for info in found.tensors.values()}),
        "digests": dict(found.digests),
        "problems": problems,
    }
    if problems:
        more = f" {len(problems) - 1} more are like that." if len(problems) > 1 else ""
        return Level("structure", "failed", problems[0] + more, figures)
    return Level("structure", "passed", figures=figures)


def _disagreements(found: StoredModel, evidence: Evidence) -> Iterator[str]:
    """Where the model's files contradict each other, or the backbone's config.json."""
    declared = _dtype_in(found.values)
    if declared not in (*DTYPES, "None"):
        yield f"dtype in config.json is {declared!r}, expected one of {', '.join(DTYPES)}."
    for name, info in found.tensors.items():
        if DTYPES.get(declared, info.dtype) != info.dtype:
            yield f"{name} is {info.dtype}, config.json says {declared}."
            break
    labels, ids = found.config.label2id, found.values.get("label2id")
    if ids is not None and ids != labels and len(labels) == len(found.config.id2label):
        yield "label2id in config.json is not the inverse of its id2label."
    preprocessor = read_json_object(found.folder / "preprocessor_config.json")
    trained, made = found.config.input_size, _size_in(preprocessor)
    if made and (mismatch := size_mismatch(trained, made)):
        yield mismatch
    task = evidence.history.task if evidence.history else None
    windows = preprocessor.get("do_split_image")
    if task and windows is not None and windows != (task == "semantic"):
        yield (
            f"do_split_image in preprocessor_config.json is {windows}, which is not for {task} "
            "segmentation."
        )
    if evidence.backbone_config:
        for key in _SHARED:
            ours, theirs = (getattr(each, key) for each in (found.config, evidence.backbone_config))
            if ours != theirs:
                yield f"{key} in config.json is {ours}, the backbone's says {theirs}."


def _dtype_in(values: Mapping[str, Any]) -> str:
    return str(values.get("dtype") or values.get("torch_dtype"))


def dtype_of(values: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """The type that a config.json declares, or else the one that all tensors have."""
    if declared := DTYPES.get(_dtype_in(values)):
        return declared
    types = {info.dtype for info in tensors.values()}
    return types.pop() if len(types) == 1 else "F32"


def _size_in(preprocessor: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) that pictures are made to fit, as far as a preprocessor_config.json says."""
    size = preprocessor.get("size")
    if not isinstance(size, dict):
        return None
    height, width = (size.get(key) or size.get("shortest_edge") for key in ("height", "width"))
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None
