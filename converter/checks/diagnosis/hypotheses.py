"""The faults that a model can have, each with an experiment that detects it.

A hypothesis looks at a case and proposes how to undo its fault. Whether that reproduces the
recording is checked by `converter.checks.diagnosis.search`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor
from torch.func import functional_call

from converter.checks.comparison import FLOAT32, Tolerance
from converter.checks.diagnosis.by_value import (
    DELTA_FAULTS,
    Reference,
    Tensors,
    is_coarse,
    layer_of,
)
from converter.checks.diagnosis.stages import PATCH_WEIGHT, Network, Stage, first_block
from converter.checks.numbers import bare_backbone
from converter.checks.pixels import Normalisation
from converter.checks.provenance import Provenance
from converter.checks.recorded import Recorded
from converter.checks.rounding import EXCESS, RIGHT_EXCESS, allowing_for_rounding
from converter.configs import IMAGE_MEAN, IMAGE_STD
from converter.weights.pairing import UNRELATED, correlation
from reference_model.activations import ACTIVATIONS, Activation

# rescale_factor in DINOv3's preprocessor_config.json, as in all others
_FACTOR = 1 / 255

# Rounding is not the cause of a difference that is smaller than this share of what rounding does.
_MIN_SHARE_OF_ROUNDING = 1 / 3

# If more stages than this are off, exchanges between two of them are not looked for: there would be
# too many pairs, and exchanges are unlikely to be the common cause.
_MAX_PAIRED_STAGES = 4

# the largest share of tensors that may differ from conversion.json to count as "replaced"
_MAX_REPLACED = 0.25


@dataclass(frozen=True)
class Case:
    """A model that fails verification.

    Attributes:
        network: the model, without the faults that were undone already.
        recorded: the recording; None if there is none.
        tolerance: how far the whole model may be off.
        stages: the network in stages.
        differences: how far each stage is off, by its name.
        reference: what its tensors should be, if known.
        faults: the tensors of each fault that was recognised by values.
        wrong: every tensor that is not what it should be, as far as known.
    """

    network: Network
    recorded: Recorded | None
    tolerance: Tolerance
    stages: tuple[Stage, ...]
    differences: Mapping[str, float]
    reference: Reference | None
    faults: Mapping[str, Tensors]
    wrong: frozenset[str] = frozenset()

    @property
    def failing(self) -> list[Stage]:
        """The stages that are off."""
        return [s for s in self.stages if not self.differences[s.name] <= s.tolerance]

    @property
    def failing_layers(self) -> list[Stage]:
        """The stages that are off and consist of a single layer."""
        return [s for s in self.failing if len(s.modules) == 1 and _is_layer(s.modules[0])]

    def typical(self) -> Stage | None:
        """A stage to try values of config.json on: of those with layers, the one in the middle.

        The worst one may have another fault as well.
        """
        through = [s for s in self.failing if any(map(_is_layer, s.modules))]
        through.sort(key=lambda stage: self.differences[stage.name])
        return through[len(through) // 2] if through else None


def _is_layer(module: str) -> bool:
    return module.startswith("layers.")


@dataclass(frozen=True)
class Explanation:
    """What would undo a fault.

    Attributes:
        tensors: the tensors with the fault.
        action: what undoes it, as the subject of a sentence; a whole sentence if nothing does.
        repaired: the network without the fault; None if it can be detected but not undone.
        by_value: whether the tensors' values alone prove it.
        stages: for a fault that only shows by the size of the differences: the stages, with that
            size as their tolerances; ``repaired`` is then the unchanged network.
    """

    tensors: tuple[str, ...]
    action: str
    repaired: Network | None
    by_value: bool = False
    stages: tuple[Stage, ...] | None = None


# what a hypothesis proposes; or a sentence that says why there is nothing to try
Proposal = Explanation | str
Hypothesis = Callable[[Case], Proposal]

_NO_SOURCES = "The sources are missing: give --delta and --backbone."
_NOTHING_FAILS = "No part of the network that this fault would change is off."


def _by_value(case: Case, fault: str, action: str) -> Explanation | None:
    """Proposes the right values for the tensors that show a fault; None if no tensor does."""
    found = case.faults.get(fault, {})
    right = {name: tensor for name, tensor in found.items() if tensor is not None}
    if not right:
        return None
    repaired = case.network.with_weights(right)
    return Explanation(tuple(right), action, repaired, by_value=True)


# the input ---------------------------------------------------------------------------------------


def masked_attention_on(case: Case) -> Proposal:
    name = "attn_mask_probs"
    probabilities = case.network.weights[name]
    if not bool((probabilities > 0).any()):
        return "attn_mask_probs is 0 everywhere."
    off = case.network.with_weights({name: torch.zeros_like(probabilities)})
    return Explanation((name,), "switching masked attention off", off, by_value=True)


def channel_order(case: Case) -> Proposal:
    weight = case.network.weights[PATCH_WEIGHT]
    if weight.shape[1] != 3:
        return f"The patch embedding has {weight.shape[1]} channels."
    turned = case.network.with_weights({PATCH_WEIGHT: weight.flip(1)})
    action = "taking the patch embedding's channels in the opposite order"
    proven = "channel-order" in case.faults
    return Explanation((PATCH_WEIGHT,), action, turned, by_value=proven)


def image_normalisation(case: Case) -> Proposal:
    """Solves for the normalisation, because patch embeddings are a linear function of it.

    With a pixel p and the weights w of a channel, a patch embedding is the sum of
    w * (p * scale / std - mean / std), plus the bias.
    """
    stage = next((s for s in case.failing if s.modules == ("embeddings",)), None)
    if stage is None:
        return _NOTHING_FAILS
    network, usual = case.network, Normalisation(_FACTOR, IMAGE_MEAN, IMAGE_STD)
    if stage.mean_square and network.normalisation == usual:
        # with rounded weights, other values fit nearly as well within the tolerance
        return "The normalisation is already DINOv3's."
    weight = network.weights[PATCH_WEIGHT].double()
    bias = network.weights["embeddings.patch_embeddings.bias"].double()
    patches = stage.end[:, network.config.num_prefix_tokens :].double()
    target = (patches - bias).flatten()
    pixels = stage.start.double().split(1, dim=1)
    columns = []
    for channel, kernel in zip(pixels, weight.split(1, dim=1), strict=True):
        products = torch.conv2d(channel, kernel, stride=network.config.patch_size)
        columns.append(products.flatten(2).transpose(1, 2).flatten())
    for kernel in weight.unbind(1):
        columns.append(-kernel.sum((1, 2)).expand_as(patches).flatten())
    matrix = torch.stack(columns, dim=1)
    if not bool(matrix.isfinite().all()):
        return "The patch embedding holds NaN or infinity."
    gains, offsets = torch.linalg.lstsq(matrix, target[:, None]).solution.flatten().chunk(2)
    if bool((gains <= 0).any()):
        return "No normalisation comes near the recorded patch embeddings."
    # mean and deviation can be scaled to fit any factor, so the usual one is assumed; published
    # means and deviations have two or three digits
    std = _FACTOR / gains
    mean = offsets * std
    candidates = [
        Normalisation(
            _FACTOR,
            tuple(round(value, digits) for value in mean.tolist()),
            tuple(round(value, digits) for value in std.tolist()),
        )
        for digits in (2, 3)
    ]
    found = next(
        (each for each in candidates if stage.is_right(network.with_normalisation(each))), None
    )
    if found is None:
        return (
            "No mean and standard deviation of up to three digits give the recorded patch "
            "embeddings."
        )
    action = (
        f"normalising with the factor {found.scale:.4g}, mean {_listed(found.mean)} and standard "
        f"deviation {_listed(found.std)}"
    )
    return Explanation((), action, network.with_normalisation(found))


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


# config.json -------------------------------------------------------------------------------------


def rope_base(case: Case) -> Proposal:
    def with_base(value: float) -> Network:
        return case.network.with_config(
            rope_parameters={"rope_type": "default", "rope_theta": value}
        )

    stage = _stage_of_rope(case)
    if isinstance(stage, str):
        return stage
    base = _search(lambda value: stage.difference(with_base(value)), 1.0, 1e7, 48)
    return Explanation((), f"a rotary base of {base:g}", with_base(base))


def attention_heads(case: Case) -> Proposal:
    stage = _stage_of_rope(case)
    if isinstance(stage, str):
        return stage
    candidates = {}
    for heads in range(1, case.network.config.hidden_size // 4 + 1):
        try:
            candidates[heads] = case.network.with_config(num_attention_heads=heads)
        except ValueError:
            continue
    heads = min(candidates, key=lambda heads: stage.difference(candidates[heads]))
    return Explanation((), f"attention with {heads} heads", candidates[heads])


def _stage_of_rope(case: Case) -> Stage | str:
    """The stage that shows rotary positions and head size best; or a sentence why there is none."""
    angles = next((stage for stage in case.stages if stage.modules == ("rope",)), None)
    if angles and angles not in case.failing:
        return "The rotary positions match the recorded ones."
    return angles or case.typical() or _NOTHING_FAILS


def layer_norm_epsilon(case: Case) -> Proposal:
    def with_epsilon(value: float) -> Network:
        return case.network.with_config(layer_norm_eps=value)

    norm = next((s for s in case.failing if s.modules == ("layernorm",)), None)
    stage = case.typical() or norm
    if stage is None:
        return _NOTHING_FAILS
    epsilon = _search(lambda value: stage.difference(with_epsilon(value)), 1e-12, 1.0, 12)
    return Explanation((), f"a layer norm epsilon of {epsilon:g}", with_epsilon(epsilon))


def activation(case: Case) -> Proposal:
    stage = case.typical()
    if stage is None:
        return _NOTHING_FAILS
    first_names: dict[Activation, str] = {}
    for name, function in ACTIVATIONS.items():
        first_names.setdefault(function, name)
    candidates = {name: case.network.with_config(hidden_act=name) for name in first_names.values()}
    name = min(candidates, key=lambda name: stage.difference(candidates[name]))
    return Explanation((), f"{name} as the activation", candidates[name])


# steps of the golden-section search
_SECTIONS = 24


def _search(difference: Callable[[float], float], low: float, high: float, steps: int) -> float:
    """The value between two bounds that minimises a difference, on a logarithmic scale.

    A grid search brackets the minimum and a golden-section search refines it; of values that are
    about equally good, the one with the fewest digits is returned.
    """
    start, step = math.log10(low), math.log10(high / low) / steps
    best = min(
        (start + i * step for i in range(steps + 1)), key=lambda power: difference(10**power)
    )
    a, b = best - step, best + step
    shrink = (math.sqrt(5) - 1) / 2
    c, d = b - shrink * (b - a), a + shrink * (b - a)
    at_c, at_d = difference(10**c), difference(10**d)
    for _ in range(_SECTIONS):
        if at_c <= at_d:
            b, d, at_d = d, c, at_c
            c = b - shrink * (b - a)
            at_c = difference(10**c)
        else:
            a, c, at_c = c, d, at_d
            d = a + shrink * (b - a)
            at_d = difference(10**d)
    found = 10 ** ((a + b) / 2)
    smallest = difference(found)
    for digits in (1, 2, 3, 4):
        rounded = float(f"{found:.{digits - 1}e}")
        if difference(rounded) <= 2 * smallest:
            return rounded
    return found


# the weights -------------------------------------------------------------------------------------


def missing_layer_scale(case: Case) -> Proposal:
    if proven := _by_value(case, "missing-layer-scale", "the layer scales of the sources"):
        return proven
    network = case.network
    fitted: dict[str, Tensor] = {}
    for stage in case.failing_layers:
        (layer,) = stage.modules
        scales = [f"{layer}.layer_scale{i}.lambda1" for i in (1, 2)]
        ones = [name for name in scales if bool((network.weights[name] == 1).all())]
        if ones:
            fitted |= _fit_scales(stage, network, ones)
    if not fitted:
        return "No layer that is off has layer scales of 1."
    action = "layer scales fitted to the recorded layers"
    return Explanation(tuple(fitted), action, network.with_weights(fitted))


def _fit_scales(stage: Stage, network: Network, names: list[str]) -> dict[str, Tensor]:
    """Fits layer scales so that a layer comes as close as possible to what was recorded.

    The two scales of a layer have some thousand unknowns, and each token gives as many equations.
    The output of attention depends on neither scale, so tokens are independent of each other and a
    few hundred of them are enough.
    """
    (layer,) = stage.modules
    x = stage.start
    if layer == f"layers.{first_block(network.config)}":
        x = torch.cat((network.weights["query.weight"].expand(len(x), -1, -1), x), dim=1)
    with torch.no_grad():
        normed = network.call(f"{layer}.norm1", x)
        attended = network.call(f"{layer}.attention", normed, network.rope(stage.grid), None)
    x, attended, end = (
        tensor.double().flatten(0, 1)[:256].clone() for tensor in (x, attended, stage.end)
    )
    weights = {
        name.removeprefix(f"{layer}."): tensor.double()
        for name, tensor in network.weights.items()
        if name.startswith(f"{layer}.")
    }
    unknown = {name: weights[name.removeprefix(f"{layer}.")].clone() for name in names}
    first, second = (
        unknown.get(f"{layer}.layer_scale{i}.lambda1", weights[f"layer_scale{i}.lambda1"])
        for i in (1, 2)
    )
    module = network.skeleton.layer

    def part(name: str, value: Tensor) -> Tensor:
        own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(name)}
        output: Tensor = functional_call(module.get_submodule(name), own, (value,))
        return output

    for scale in unknown.values():
        scale.requires_grad_()
    optimiser = torch.optim.LBFGS(
        list(unknown.values()),
        max_iter=500,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        middle = x + first * attended
        output = middle + second * part("mlp", part("norm2", middle))
        error = (output - end).square().sum()
        error.backward()
        return error

    optimiser.step(loss)
    return {name: scale.detach().float() for name, scale in unknown.items()}


def layers_permuted(case: Case) -> Proposal:
    """Tries every layer that is off in the place of every other one."""
    if proven := _by_value(case, "layers-permuted", "putting the layers in their right places"):
        return proven
    places = {stage.modules[0]: stage for stage in case.failing_layers}
    if len(places) < 2:
        return "Fewer than two single layers are off."
    network = case.network
    home: dict[str, str] = {}
    for layer, stage in places.items():
        for other in places:
            if other not in (layer, *home.values()) and stage.is_right(
                network.with_weights(_moved(network, other, layer))
            ):
                home[layer] = other
                break
    while strays := [layer for layer in home if layer not in home.values()]:
        for layer in strays:
            del home[layer]
    if not home:
        return "No layer gives what was recorded for another one."
    moved: dict[str, Tensor] = {}
    for layer, other in home.items():
        moved |= _moved(network, other, layer)
    tensors = tuple(name for name in moved if not torch.equal(moved[name], network.weights[name]))
    action = "taking " + ", ".join(f"{other} for {layer}" for layer, other in home.items())
    return Explanation(tensors, action, network.with_weights(moved))


def _moved(network: Network, layer: str, to: str) -> dict[str, Tensor]:
    return {
        name.replace(layer, to, 1): tensor
        for name, tensor in network.weights.items()
        if layer_of(name) == layer
    }


def tensors_swapped(case: Case) -> Proposal:
    """Swaps tensors of one shape, within each stage that is off and then between two of them."""
    if proven := _by_value(case, "tensors-swapped", "putting the tensors in their right places"):
        return proven
    stages = [s for s in case.failing if sum(map(_is_layer, s.modules)) <= 1]
    if not stages:
        return "The recording has no hidden states." if case.failing else _NOTHING_FAILS
    network = case.network
    swaps: list[Swap] = []
    left = []
    for stage in stages:
        names = stage.tensors(network)
        swap = _find_swap(_swaps(names, names, network), network, (stage,))
        if swap:
            swaps.append(swap)
        else:
            left.append(stage)
    for pair in combinations(left, 2) if len(left) <= _MAX_PAIRED_STAGES else ():
        one, other = (stage.tensors(network) for stage in pair)
        if swap := _find_swap(_swaps(one, other, network), network, pair):
            swaps.append(swap)
    if not swaps:
        return "Exchanging two tensors does not give what was recorded."
    changed = {name: tensor for swap in swaps for name, tensor in swap.items()}
    action = f"putting {len(changed)} tensors in each other's place"
    return Explanation(tuple(sorted(changed)), action, network.with_weights(changed))


# exchanged tensors, by the names they get
Swap = dict[str, Tensor]


def _swaps(some: list[str], others: list[str], network: Network) -> Iterator[Swap]:
    """Every exchange of two modules that have tensors of the same shapes, then of two tensors."""
    for a, b in product(*(dict.fromkeys(map(_module_of, names)) for names in (some, others))):
        kinds = {name.removeprefix(a) for name in some if _module_of(name) == a}
        if a < b and len(kinds) > 1 and all(a + k in some and b + k in others for k in kinds):
            yield from _swap([(a + kind, b + kind) for kind in sorted(kinds)], network)
    for a, b in product(some, others):
        if a < b or some is not others:
            yield from _swap([(a, b)], network)


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _swap(pairs: list[tuple[str, str]], network: Network) -> Iterator[Swap]:
    weights = network.weights
    if all(weights[a].shape == weights[b].shape for a, b in pairs):
        changed = {a: weights[b] for a, b in pairs} | {b: weights[a] for a, b in pairs}
        changed = {n: t for n, t in changed.items() if not torch.equal(t, weights[n])}
        if changed:
            yield changed


def _find_swap(swaps: Iterable[Swap], network: Network, stages: tuple[Stage, ...]) -> Swap | None:
    """The first exchange that repairs all of these stages."""
    for swap in swaps:
        changed = network.with_weights(swap)
        if all(stage.is_right(changed) for stage in stages):
            return swap
    return None


def _delta_fault(fault: str, action: str) -> Hypothesis:
    """A hypothesis about how often the delta was added, by tensor values or by the numbers."""

    def propose(case: Case) -> Proposal:
        if proven := _by_value(case, fault, action):
            return proven
        provenance = case.reference.provenance if case.reference else None
        if provenance is None:
            return _NO_SOURCES
        network, lacking = case.network, DELTA_FAULTS[fault]
        added = {name for name, row in provenance.rows.items() if row.operation == "add"}
        changed: dict[str, Tensor] = {}
        for stage in case.failing:
            mended = {}
            for name in added.intersection(stage.tensors(network)):
                delta = provenance.operand(name, "delta")
                if delta is not None and delta.any():
                    mended[name] = network.weights[name] + lacking * torch.from_numpy(delta)
            if mended and stage.is_right(network.with_weights(mended)):
                changed |= mended
        if not changed:
            return "It does not repair any part that is off."
        return Explanation(tuple(sorted(changed)), action, network.with_weights(changed))

    return propose


def rounded_to_16_bits(case: Case) -> Proposal:
    """Whether the network is off by as much as rounding its weights to 16 bits would make it."""
    if proven := _by_value(case, "rounded-to-16-bits", "the weights before they were rounded"):
        return proven
    network = case.network
    coarse = {name: is_coarse(tensor) for name, tensor in network.weights.items()}
    types = {name: dtype for name, dtype in coarse.items() if dtype}
    if not types:
        return "No tensor has only values that 16 bits can represent."
    stages = allowing_for_rounding(case.stages, network, types)
    off = {stage.name for stage in case.failing}
    ratios = [
        EXCESS * stage.difference(network) / stage.tolerance
        for stage in stages
        if stage.mean_square and stage.name in off
    ]
    if not any(_MIN_SHARE_OF_ROUNDING <= ratio <= RIGHT_EXCESS for ratio in ratios):
        return "The differences do not have the size that rounding would give them."
    action = f"rounding to {' and '.join(sorted(set(types.values())))}"
    return Explanation(tuple(types), action, network, stages=stages)


def other_backbone(case: Case) -> Proposal:
    provenance = case.reference.provenance if case.reference else None
    if proven := _by_value(case, "other-backbone", "the delta added to the backbone given"):
        return proven
    if provenance is None:
        return _NO_SOURCES
    added = [name for name, row in provenance.rows.items() if row.operation == "add"]
    if wrong := case.wrong.intersection(added):
        return (
            f"{len(wrong)} of the {len(added)} tensors that the delta is added to are not what the "
            f"sources give; they differ by {_distance(case.network, provenance, wrong):.2g} of "
            "their size, but not as a backbone from another training would."
        )
    recorded = case.recorded.tensors.get("backbone.last_hidden_state") if case.recorded else None
    if case.recorded is None or recorded is None or "backbone" not in provenance.files:
        return "The tensors match the sources, and no output of the bare backbone is recorded."
    trunk = [s for s in case.stages if s.modules[0].startswith(("embeddings", "layers.", "layern"))]
    if any(stage not in case.failing for stage in trunk):
        return "Parts of the backbone are right."
    inputs = case.network.normalisation(case.recorded.pixels[: len(recorded)])
    with torch.inference_mode():
        tokens = bare_backbone(provenance)(inputs)
    difference = float((tokens - recorded).abs().max())
    if difference <= FLOAT32.of(recorded):
        return "The output of the bare backbone matches the recorded one."
    # without the channels' means, which may be similar in other trainings
    alike = correlation([tuple(each.flatten(0, -2).numpy() for each in (tokens, recorded))])
    if abs(alike) > UNRELATED:
        return (
            f"The bare backbone is off by {difference:.2g}, and its output has a correlation of "
            f"{alike:.2g} with the recorded one; a backbone from another training would have none."
        )
    action = (
        f"the bare backbone, without the delta, is off by {difference:.2g}, in all of its parts, "
        f"and its output has a correlation of {alike:.2g} with the recorded one"
    )
    return Explanation(tuple(added), action, None)


def _distance(network: Network, provenance: Provenance, names: Iterable[str]) -> float:
    """Distance of tensors from their right values, divided by the size of these (L2 norms)."""
    square = size = 0.0
    for name in names:
        right = torch.from_numpy(provenance.tensor(name)).double()
        square += float((network.weights[name].double() - right).square().sum())
        size += float(right.square().sum())
    return math.sqrt(square / size) if size else math.inf


def tensor_replaced(case: Case) -> Proposal:
    if proven := _by_value(
        case, "tensor-replaced", "giving these tensors the values they should hold"
    ):
        return proven
    names = tuple(case.faults.get("tensor-replaced", ()))
    if case.reference is None:
        return _NO_SOURCES
    if not names:
        return "Every tensor is right, or has another fault that its values show."
    if len(names) > _MAX_REPLACED * len(case.network.weights):
        return f"{len(names)} tensors are not what conversion.json says. {_NO_SOURCES}"
    action = "the tensors are not what conversion.json says, and all that is off uses them"
    return Explanation(names, action, None, by_value=True)


# The names of faults are public. More specific faults come before those that explain more.
HYPOTHESES: Mapping[str, Hypothesis] = {
    "masked-attention-on": masked_attention_on,
    "channel-order": channel_order,
    "image-normalisation": image_normalisation,
    "missing-layer-scale": missing_layer_scale,
    "rope-base": rope_base,
    "attention-heads": attention_heads,
    "activation": activation,
    "layer-norm-epsilon": layer_norm_epsilon,
    "layers-permuted": layers_permuted,
    "tensors-swapped": tensors_swapped,
    "delta-added-twice": _delta_fault(
        "delta-added-twice", "adding the delta once instead of twice"
    ),
    "delta-not-added": _delta_fault("delta-not-added", "adding the delta"),
    "delta-subtracted": _delta_fault(
        "delta-subtracted", "adding the delta instead of subtracting it"
    ),
    "rounded-to-16-bits": rounded_to_16_bits,
    "other-backbone": other_backbone,
    "tensor-replaced": tensor_replaced,
}
