"""Recognises faults by the values and digests of tensors, without running the model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from converter.checks.diagnosis.stages import PATCH_WEIGHT
from converter.checks.provenance import Provenance
from converter.weights.pairing import UNRELATED, correlation

# faults in how the delta was added, and how many deltas must be added to undo them
DELTA_FAULTS = {"delta-added-twice": -1, "delta-not-added": 1, "delta-subtracted": 2}

# relative error of sums that were added in another order and rounded, by dtype
_SUM_ERROR = {"F32": 2**-21, "F16": 2**-9, "BF16": 2**-6}


@dataclass(frozen=True)
class Reference:
    """What the tensors of a model should be.

    Attributes:
        digests: SHA-256 of every tensor, by name.
        provenance: the model's sources; None if only digests are known.
    """

    digests: Mapping[str, str]
    provenance: Provenance | None


def is_coarse(tensor: Tensor) -> str | None:
    """The 16-bit dtype, bfloat16 or float16, that can represent float32 values; None if none can.

    Values with up to four significant bits, such as 0, 1 and 0.75, do not show that they were
    rounded: for a tensor of only such values, the result is None.
    """
    if not bool((tensor.contiguous().view(torch.int32) & 0xFFFFF).any()):
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).float(), tensor):
            return str(dtype).removeprefix("torch.")
    return None


# the right values of tensors, by name; None if they are not known
Tensors = Mapping[str, Tensor | None]


def faults_by_value(
    weights: Mapping[str, Tensor], digests: Mapping[str, str], reference: Reference
) -> dict[str, Tensors]:
    """The faulty tensors, by the name of their fault.

    Without the sources, wrong tensors that are not recognised count as ``tensor-replaced``.

    Args:
        weights: the model's tensors.
        digests: SHA-256 of the tensors as stored.
        reference: what they should be.
    """
    wrong = wrong_tensors(weights, digests, reference)
    home = _home(wrong, digests, reference.digests)
    whole_layers = _whole_layers(home, digests, reference.digests)
    faults: dict[str, dict[str, Tensor | None]] = {}
    others = []
    for name in wrong:
        right = _right(name, home, weights, reference.provenance)
        if layer_of(name) in whole_layers:
            faults.setdefault("layers-permuted", {})[name] = right
        elif name in home:
            faults.setdefault("tensors-swapped", {})[name] = right
        elif fault := _fault_of(name, weights[name], right, reference.provenance):
            faults.setdefault(fault, {})[name] = right
        else:
            others.append(name)
    provenance = reference.provenance
    for fault, names in _replaced(others, weights, provenance).items():
        faults[fault] = {name: _right(name, {}, weights, provenance) for name in names}
    return dict(faults)


def wrong_tensors(
    weights: Mapping[str, Tensor], digests: Mapping[str, str], reference: Reference
) -> list[str]:
    """Names of the tensors whose digests are not the expected ones."""
    return [name for name in weights if digests[name] != reference.digests.get(name)]


def _right(
    name: str,
    home: Mapping[str, str],
    weights: Mapping[str, Tensor],
    provenance: Provenance | None,
) -> Tensor | None:
    if provenance and name in provenance.rows:
        return torch.from_numpy(provenance.tensor(name))
    return next((weights[other] for other, belongs in home.items() if belongs == name), None)


def layer_of(name: str) -> str | None:
    """The layer that a tensor belongs to, such as ``layers.2``."""
    match = re.match(r"layers\.\d+", name)
    return match[0] if match else None


def _home(
    wrong: Iterable[str], digests: Mapping[str, str], expected: Mapping[str, str]
) -> dict[str, str]:
    """For tensors that were exchanged: the name under which each one belongs."""
    wrong = list(wrong)
    belongs = {expected[name]: name for name in wrong if name in expected}
    home = {name: belongs[digests[name]] for name in wrong if digests[name] in belongs}
    # a tensor is a copy, not exchanged, if no other tensor belongs in its place
    while strays := [name for name in home if name not in home.values()]:
        for name in strays:
            del home[name]
    return home


def _whole_layers(
    moved: Mapping[str, str], digests: Mapping[str, str], expected: Mapping[str, str]
) -> set[str]:
    """Layers that were exchanged with others as a whole."""
    layers = set()
    for name, home in moved.items():
        layer, origin = layer_of(name), layer_of(home)
        if layer is None or origin is None or layer == origin:
            continue
        places = {n: n.replace(layer, origin, 1) for n in digests if layer_of(n) == layer}
        if all(digests[place] == expected.get(target) for place, target in places.items()):
            layers.add(layer)
    return layers


def _fault_of(
    name: str, found: Tensor, right: Tensor | None, provenance: Provenance | None
) -> str | None:
    if name == "attn_mask_probs" and bool((found > 0).any()):
        return "masked-attention-on"
    if name.endswith("lambda1") and bool((found == 1).all()):
        return "missing-layer-scale"
    if right is None or provenance is None:
        return None
    dtype = provenance.rows[name].dtype
    if name == PATCH_WEIGHT and torch.equal(found.flip(1), right):
        return "channel-order"
    coarse = is_coarse(found)
    if dtype == "F32" and coarse and _is_rounded(found, right, getattr(torch, coarse)):
        return "rounded-to-16-bits"
    return _delta_fault(name, found, right, provenance)


def _is_rounded(found: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``found`` is ``right``, rounded to nearest or towards zero, without other changes."""
    if dtype == torch.bfloat16 and torch.equal(
        found.view(torch.int32), right.contiguous().view(torch.int32) & -0x10000
    ):
        return True
    # a sum that was added in another order may be rounded to the neighbouring value
    error = 2**-21 * right.abs()
    low, high = ((right + sign * error).to(dtype).float() for sign in (-1, 1))
    lower, upper = torch.minimum(low, high), torch.maximum(low, high)
    return bool(((lower <= found) & (found <= upper)).all())


def _delta_fault(name: str, found: Tensor, right: Tensor, provenance: Provenance) -> str | None:
    delta = provenance.operand(name, "delta")
    if provenance.rows[name].operation != "add" or delta is None:
        return None
    change = torch.from_numpy(delta)
    allowed = _SUM_ERROR[provenance.rows[name].dtype] * (right.abs() + 3 * change.abs())
    if not bool((change.abs() > 4 * allowed).any()):
        return None
    for fault, lacking in DELTA_FAULTS.items():
        if bool(((found + lacking * change - right).abs() <= allowed).all()):
            return fault
    return None


def _replaced(
    names: list[str], weights: Mapping[str, Tensor], provenance: Provenance | None
) -> dict[str, list[str]]:
    """Decides whether wrong tensors come from another backbone or were replaced one by one.

    It is another backbone if that explains most of the values that the delta is added to. If most
    tensors are wrong for another reason, the fault has no name.
    """
    rows = provenance.rows.values() if provenance else ()
    added = {row.name: row.size for row in rows if row.operation == "add"}
    foreign = [name for name in names if name in added]
    most = 2 * sum(added[name] for name in foreign) > sum(added.values())
    if provenance and most and _is_of_other_training(foreign, weights, provenance):
        others = [name for name in names if name not in added]
        return {"other-backbone": foreign} | ({"tensor-replaced": others} if others else {})
    if not names or (added and 2 * len(foreign) > len(added)):
        return {}
    return {"tensor-replaced": names}


def _is_of_other_training(
    names: list[str], weights: Mapping[str, Tensor], provenance: Provenance
) -> bool:
    """Whether tensors are the delta plus a backbone that is unrelated to the given one.

    Then the projection of model - base on the delta is about 1, because the difference between two
    backbones is unrelated to the delta. And what the delta was added to has no correlation with the
    base; the same backbone, trained further or with noise, would have one.
    """
    product = square = variance = 0.0
    pairs: list[tuple[np.ndarray[Any, Any], ...]] = []
    for name in names:
        base, delta = (provenance.operand(name, source) for source in ("backbone", "delta"))
        if base is None or delta is None:
            continue
        change = delta.astype(np.float64)
        other = weights[name].numpy().astype(np.float64) - change
        rest = other - base
        product += float((rest * change).sum())
        square += float((change**2).sum())
        variance += float(((rest * change) ** 2).sum())
        if base.ndim > 1:  # norms, biases and scales are similar in all trainings
            pairs.append((other.reshape(len(other), -1), base.reshape(len(base), -1)))
    once = abs(product) <= max(0.5 * square, 5 * variance**0.5)
    return bool(pairs) and once and abs(correlation(pairs)) <= UNRELATED
