"""Which fault changed a tensor, told by its values and digests, before anything is run."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from converter.checks.diagnosis.stages import PATCH_WEIGHT
from converter.checks.provenance import Provenance

# what the model has instead of base + delta, and how many deltas it lacks
DELTA_FAULTS = {"delta-added-twice": -1, "delta-not-added": 1, "delta-subtracted": 2}

# of sums that were taken in another order and rounded to a type
_SUM_ERROR = {"F32": 2**-21, "F16": 2**-9, "BF16": 2**-6}

# The weights of two trainings have a correlation of 0, but for chance; those of one that went
# further, or was rounded, have more (benchmarks/tolerances.py).
UNRELATED = 0.2


@dataclass(frozen=True)
class Reference:
    """What the tensors of a model should be.

    Attributes:
        digests: SHA-256 of every tensor, by name.
        provenance: its sources; None where only digests are known.
    """

    digests: Mapping[str, str]
    provenance: Provenance | None


def is_coarse(tensor: Tensor) -> str | None:
    """The 16-bit type, bfloat16 or float16, that float32 values fit in; None if they fit in none.

    Numbers of up to four significant bits, such as 0, 1 and 0.75, say nothing of rounding.
    """
    if not bool((tensor.contiguous().view(torch.int32) & 0xFFFFF).any()):
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).float(), tensor):
            return str(dtype).removeprefix("torch.")
    return None


# Tensors with what they should hold; None where that is not known.
Tensors = Mapping[str, Tensor | None]


def faults_by_value(
    weights: Mapping[str, Tensor], digests: Mapping[str, str], reference: Reference
) -> dict[str, Tensors]:
    """The tensors of each fault.

    Without the sources, what is not recognised is ``tensor-replaced``.

    Args:
        weights: the model's tensors.
        digests: their SHA-256 as they are stored.
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
    """The tensors that are not what they should be, by their digests."""
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
    """Tensors that stand in each other's place: where each of them belongs."""
    wrong = list(wrong)
    belongs = {expected[name]: name for name in wrong if name in expected}
    home = {name: belongs[digests[name]] for name in wrong if digests[name] in belongs}
    # what lies where it belongs to nobody else is a copy, and its own place was overwritten
    while strays := [name for name in home if name not in home.values()]:
        for name in strays:
            del home[name]
    return home


def _whole_layers(
    moved: Mapping[str, str], digests: Mapping[str, str], expected: Mapping[str, str]
) -> set[str]:
    """Layers that stand in the place of others as a whole."""
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
    """Whether values are others, rounded to nearest or towards zero, and nothing besides."""
    if dtype == torch.bfloat16 and torch.equal(
        found.view(torch.int32), right.contiguous().view(torch.int32) & -0x10000
    ):
        return True
    # a sum that was taken in another order may lie on the other side of the middle
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
    """Tells another backbone, which most of the numbers that a delta was added to come from.

    Where most tensors hold neither that nor what they should, the fault has no name.
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
    """Whether tensors are the delta and something that has nothing to do with the backbone.

    The projection of model - base on the delta is 1 then, but for chance: what another backbone
    differs by has nothing to do with the delta. And what the delta was added to has no correlation
    with the base; that of the same backbone, trained further or with noise, has.
    """
    product = square = variance = 0.0
    pairs: list[tuple[Tensor, Tensor]] = []
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
        if base.ndim > 1:  # norms, biases and scales are alike in all trainings
            pairs.append((torch.from_numpy(other).flatten(1), torch.from_numpy(base).flatten(1)))
    once = abs(product) <= max(0.5 * square, 5 * variance**0.5)
    return bool(pairs) and once and abs(correlation(pairs)) <= UNRELATED


def correlation(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The correlation of two sets of tensors, from -1 to 1, without what their columns have alike.

    Args:
        pairs: of matrices of one shape; the mean of every column is taken away.
    """
    product = ours = theirs = 0.0
    for pair in pairs:
        a, b = (matrix.double() - matrix.double().mean(0) for matrix in pair)
        product += float((a * b).sum())
        ours += float(a.square().sum())
        theirs += float(b.square().sum())
    return product / math.sqrt(ours * theirs) if ours and theirs else 0.0
