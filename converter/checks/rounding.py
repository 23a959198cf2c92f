"""Measures what rounding its weights to 16 bits does to a network, to tell it from other faults.

Rounded weights put every part of a network off by an amount that depends on the network. To measure
it, weights that round to the same values are drawn at random: a part may be off by as much as these
move it, and not by more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from converter.checks.comparison import (
    AGREEMENT,
    FLOAT32,
    ROUNDED,
    Comparison,
    compare,
    disagreement,
)
from converter.checks.diagnosis.stages import Network, Stage
from converter.checks.numbers import LOGITS, Numbers, compute_outputs, judge_again
from converter.checks.recorded import Recorded
from reference_model import EomtDinov3ForUniversalSegmentation

# How far a part may be off, in units of what random weights that round to the same values do.
# Correct ones were measured to be off by up to 1.3 (benchmarks/tolerances.py); RIGHT_EXCESS is that
# with a small margin.
EXCESS = 2.0
RIGHT_EXCESS = 1.5

# number of draws; the one that moves a part furthest counts
_DRAWS = 8


def with_cost_of_rounding(
    of_sums: Numbers, of_rounded: Numbers, recorded: Recorded, dtype: str
) -> Numbers:
    """The numbers of the float32 sums, with figures that show what rounding the weights changes.

    Args:
        of_sums: numbers of the sums that the weights were rounded from; these decide.
        of_rounded: numbers of the model itself; its outputs are kept.
        recorded: the recording that both were compared with.
        dtype: ``bfloat16`` or ``float16``.
    """
    level = of_sums.level
    agreed = {name: of_rounded.level.figures[name] for name in AGREEMENT}
    shares = []
    for name in LOGITS:
        values = recorded.tensors[name].double()
        shares.append(of_rounded.compared[name].max_abs / float(values.max() - values.min()))
    figures = {
        **level.figures,
        "rounded_to": dtype,
        "unrounded": True,
        "rounding": {"share_of_range": max(shares), **agreed},
    }
    least = ROUNDED[dtype]
    broken = list(disagreement(agreed, recorded.tensors["class_logits"][..., 0].numel(), least))
    if level.status == "failed":
        reason = f"{level.reason} This is already so before rounding, with the float32 sums."
    elif broken:
        reason = f"The model is right before rounding to {dtype}, but not after it. {broken[0]}"
        level = replace(level, status="failed")
    else:
        reason = (
            f"{level.reason} These numbers are for the float32 sums that the weights were rounded "
            f"from. Rounding to {dtype} moves logits by up to {max(shares):.2%} of their "
            f"range: same best class {agreed['best_class']:.1%}, mask IoU "
            f"{agreed['mask_iou']:.3f}, same segment {agreed['same_segment']:.1%}."
        )
    level = replace(level, reason=reason.strip(), figures=figures)
    return replace(of_sums, level=level, outputs=of_rounded.outputs)


def check_rounded(
    model: EomtDinov3ForUniversalSegmentation,
    numbers: Numbers,
    network: Network,
    stages: Sequence[Stage],
    recorded: Recorded,
    types: Mapping[str, str],
    dtype: str,
) -> Numbers:
    """Judges the numbers of rounded weights against a recording of unrounded ones.

    Each part of the network may be off by no more than rounding moves that part of this network.
    Outputs may be off by as much as rounding moved them in the benchmark or, if all parts are
    right, by as much as it moves them in this network; classes and masks must agree in any case.

    Args:
        model: on the device where it runs.
        numbers: the result of running it.
        network: the same weights.
        stages: the network's stages, with tolerances for rounding.
        recorded: the recording that they are compared with.
        types: ``bfloat16`` or ``float16``, by the names of the tensors that were rounded.
        dtype: the coarsest dtype among them.
    """
    tolerance = ROUNDED[dtype]
    numbers = judge_again(numbers, recorded, tolerance)
    excess, failures = {}, {}
    for stage in stages:
        difference = stage.difference(network)
        if stage.mean_square:
            excess[stage.name] = EXCESS * difference / stage.tolerance
        if difference > stage.tolerance:
            failures[stage.name] = (
                f"{stage.name} is off by {excess[stage.name]:.3g} times as much as rounding to "
                f"{dtype} explains, more than {EXCESS:g} times."
                if stage.mean_square
                else f"{stage.name} differs by up to {difference:.3g}; rounding does not cause it."
            )
    compared = dict(numbers.compared)
    by_layer = not failures and _all_layers(recorded, network)
    if by_layer:
        compared = _allowing_for_draws(model, numbers, network, recorded, types)
    for name, failure in failures.items():
        stage = next(stage for stage in stages if stage.name == name)
        if name in compared:
            compared[name] = replace(compared[name], failure=failure)
        else:  # the rotary positions, which are not an output of the model
            found = compare(name, stage.run(network), stage.end, FLOAT32)
            compared = {name: replace(found, failure=failure), **compared}
    problems = [comparison.failure for comparison in compared.values() if comparison.failure]
    queries = recorded.tensors["class_logits"][..., 0].numel()
    if differing := list(disagreement(numbers.level.figures, queries, tolerance)):
        alone = by_layer and not problems
        why = "Every part is right except for rounding; the network magnifies it. " if alone else ""
        problems.append(why + differing[0])
    part = "each layer" if _all_layers(recorded, network) else "the parts that were recorded"
    reason = (
        f"Weights in {dtype} cannot show a fault that moves {part} by less than {EXCESS:g} times "
        "as much as rounding does, such as a wrong layer norm epsilon or GELU's tanh approximation."
    )
    figures = {"rounded_to": dtype, "rounding_excess": max(excess.values(), default=None)}
    level = replace(
        numbers.level,
        status="failed" if problems else "passed",
        reason=problems[0] if problems else reason,
        figures={**numbers.level.figures, **figures},
    )
    return replace(numbers, level=level, compared=compared)


def _all_layers(recorded: Recorded, network: Network) -> bool:
    """Whether the output of every layer was recorded."""
    layers = range(network.config.num_hidden_layers)
    return all(f"hidden_states.{layer}" in recorded.tensors for layer in layers)


def _allowing_for_draws(
    model: EomtDinov3ForUniversalSegmentation,
    numbers: Numbers,
    network: Network,
    recorded: Recorded,
    types: Mapping[str, str],
) -> dict[str, Comparison]:
    """The comparisons, without the failures that rounding to these types explains.

    All parts of the network are right; how far rounding moves its outputs depends on the network.
    """
    failing = [name for name, comparison in numbers.compared.items() if comparison.failure]
    if not failing or not numbers.comparable:
        return dict(numbers.compared)
    generator = torch.Generator().manual_seed(0)
    inputs = network.normalisation(recorded.pixels)
    moved = dict.fromkeys(failing, 0.0)
    for _ in range(_DRAWS):
        drawn = {
            name: with_rounding_error(network.weights[name], dtype, generator)
            for name, dtype in types.items()
        }
        _load(model, {**network.weights, **drawn})
        outputs = compute_outputs(model, inputs, recorded)
        for name in failing:
            if name in outputs:
                off = (outputs[name] - numbers.outputs[name]).abs().max()
                moved[name] = max(moved[name], float(off))
    _load(model, network.weights)
    return {
        name: replace(comparison, failure="")
        if comparison.failure and comparison.max_abs <= EXCESS * moved[name]
        else comparison
        for name, comparison in numbers.compared.items()
    }


def _load(model: EomtDinov3ForUniversalSegmentation, weights: Mapping[str, Tensor]) -> None:
    """Gives a model other weights, without writing into the tensors that it had."""
    on_device = {name: tensor.to(model.device) for name, tensor in weights.items()}
    model.load_state_dict(on_device, assign=True)


def allowing_for_rounding(
    stages: Sequence[Stage], network: Network, types: Mapping[str, str]
) -> tuple[Stage, ...]:
    """The stages, with tolerances for weights that were rounded.

    A stage with rounded weights is judged by the root mean square of its difference, which varies
    less than the largest difference.

    Args:
        stages: stages of the network.
        network: the network with the rounded weights.
        types: ``bfloat16`` or ``float16``, by the names of the tensors that were rounded.
    """
    return tuple(_allowing(stage, network, types) for stage in stages)


def _allowing(stage: Stage, network: Network, types: Mapping[str, str]) -> Stage:
    generator = torch.Generator().manual_seed(0)
    rounded = [name for name in stage.tensors(network) if name in types]
    # NaN and infinity count as 0, so that the other weights still show what rounding does
    network = network.with_weights({n: network.weights[n].nan_to_num(0, 0, 0) for n in rounded})
    output = stage.run(network).double()
    usual = 0.0
    for _ in range(_DRAWS if rounded else 0):
        drawn = {
            name: with_rounding_error(network.weights[name], types[name], generator)
            for name in rounded
        }
        moved = stage.run(network.with_weights(drawn)).double() - output
        usual = max(usual, float(moved.square().mean().sqrt()))
    if EXCESS * usual <= stage.tolerance:  # always the case if nothing was rounded
        return stage
    return replace(stage, tolerance=EXCESS * usual, right=RIGHT_EXCESS * usual, mean_square=True)


def with_rounding_error(values: Tensor, dtype: str, generator: torch.Generator) -> Tensor:
    """Draws values that may have been there before rounding: all of them round to ``values``.

    Args:
        values: float32 values that the dtype can represent.
        dtype: ``bfloat16`` or ``float16``.
        generator: source of random numbers.

    Returns:
        float32 values; zeros stay zeros, because they rarely come from rounding.
    """
    limits = torch.finfo(getattr(torch, dtype))
    mantissa, exponent = torch.frexp(values)
    step = torch.ldexp(torch.ones_like(values), exponent - 1) * limits.eps
    step.clamp_(min=limits.smallest_normal * limits.eps)  # the distance of subnormal numbers
    error = (torch.rand(values.shape, generator=generator) - 0.5) * step
    # below a power of 2, the next smaller number is only half as far away
    error = torch.where((mantissa.abs() == 0.5) & (error * values < 0), error / 2, error)
    return torch.where(values == 0, values, values + error)
