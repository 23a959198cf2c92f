"""Why an exported file gives other outputs: its weights, or how it computes.

The reference model with the file's own weights decides: if it gives the right outputs, the weights
are right, and the file computes something else with them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from converter.checks.diagnosis.by_value import Reference
from converter.checks.diagnosis.overflow import find_overflow
from converter.checks.diagnosis.search import diagnose, not_tried
from converter.checks.diagnosis.stages import cut
from converter.checks.exported_numbers import Judged, Target, computed_by, judge
from converter.checks.numbers import check_numbers, first_difference, judge_outputs
from converter.checks.pixels import Normalisation
from converter.checks.rounding import allowing_for_rounding
from converter.checks.verdict import Cause, Trial, Verdict
from converter.configs import IMAGE_MEAN, IMAGE_STD
from converter.errors import MissingKernelError
from converter.weights.merge import BUFFERS

# how a file may want its pixels, if it normalises them itself or was made for others
_INPUTS: Mapping[str, Normalisation] = {
    "pixels from 0 to 255": Normalisation(1.0, (0.0,) * 3, (1.0,) * 3),
    "pixels from 0 to 1": Normalisation(1 / 255, (0.0,) * 3, (1.0,) * 3),
    "pixels from -1 to 1": Normalisation(1 / 255, (0.5,) * 3, (0.5,) * 3),
    "pixels normalised with ImageNet's mean and deviation": Normalisation(
        1 / 255, IMAGE_MEAN, IMAGE_STD
    ),
}


def blame(
    verdict: Verdict, judged: Judged, digests: Mapping[str, str], expected: Mapping[str, str]
) -> Verdict:
    """Adds to a failed verdict where the difference begins and, if it is found, the cause.

    Args:
        verdict: on an exported file.
        judged: its numbers.
        digests: SHA-256 of the model's tensors in the file, by name.
        expected: what they should be; empty if unknown.
    """
    numbers, target, network = judged.numbers, judged.target, judged.network
    failed = judged.level.status == "failed"
    if failed and numbers:
        begins = first_difference(numbers.compared, network.config if network else None)
        verdict = replace(verdict, first_difference=begins)
    if network is None or (failed and not (numbers and numbers.comparable)):
        return verdict
    if failed and target and numbers and (target.computed or _has_right_weights(judged, target)):
        found = (look(judged, target) for look in _CAUSES)
        cause = next(filter(None, found), None)
        # outputs that were computed with the file's weights cannot show that these are right
        reason = (
            "The reference model with the file's weights gives other outputs than the file."
            if target.computed
            else "The file computes something else with the right weights. The reference model "
            "gives the right outputs with the file's weights."
        )
        tried = {trial.name: trial for trial in not_tried(reason)}
        if cause:
            tried[cause.name] = Trial(cause.name, "explains all", cause.residual, cause.explanation)
        return _with_remark(replace(verdict, cause=cause, tried=tuple(tried.values())), reason)
    stages = None
    if failed and target and judged.rounded:
        whole = cut(target.recorded, network.config)
        stages = allowing_for_rounding(whole, network, judged.rounded)
    unchecked = dict.fromkeys(BUFFERS, "")  # which no exported file has
    cause, tried_faults = diagnose(
        network,
        target.recorded if failed and target else None,
        target.tolerance if failed and target else judged.tolerance,
        stages,
        {**unchecked, **digests},
        Reference({**unchecked, **expected}, None) if expected else None,
    )
    return replace(verdict, cause=cause, tried=tried_faults)


def _with_remark(verdict: Verdict, remark: str) -> Verdict:
    levels = tuple(
        replace(level, reason=f"{level.reason} {remark}") if level.level == "numbers" else level
        for level in verdict.levels
    )
    return replace(verdict, levels=levels)


def _has_right_weights(judged: Judged, target: Target) -> bool:
    """Whether the reference model with the file's weights gives the right outputs."""
    network = judged.network
    if network is None:
        return False
    numbers = check_numbers(
        network.build(), network.normalisation, target.recorded, target.tolerance, None
    )
    return numbers.level.status == "passed"


def _provider(judged: Judged, target: Target) -> Cause | None:
    if not judged.runs.providers:
        return None
    try:
        on_cpu = judge(replace(judged, runs=replace(judged.runs, providers=())), target)
    except MissingKernelError:  # the CPU cannot run what the provider ran
        return None
    if on_cpu.level.status != "passed":
        return None
    explanation = f"running the same file on the CPU gives the expected outputs{_residual(on_cpu)}"
    return Cause("provider", (), on_cpu.level.figures["max_abs"], explanation, 1.0)


def _overflow(judged: Judged, target: Target) -> Cause | None:
    network, numbers = judged.network, judged.numbers
    if judged.dtype != "float16" or network is None or numbers is None:
        return None
    if all(bool(torch.isfinite(output).all()) for output in numbers.outputs.values()):
        return None
    inputs = judged.normalisation(target.recorded.pixels)
    found = find_overflow(network.build(), inputs)
    if found is None:
        return None
    return Cause("activation-overflow", (), None, str(found), 1.0)


def _inputs(judged: Judged, target: Target) -> Cause | None:
    """The file normalises pixels itself, or was made for pixels of another range."""
    if target.recorded.pixels.shape[1] != 3:
        return None
    for name, normalisation in _INPUTS.items():
        if normalisation == judged.normalisation:
            continue
        found = judge(replace(judged, normalisation=normalisation), target)
        if found.level.status == "passed":
            explanation = f"giving it {name} gives the expected outputs{_residual(found)}"
            residual = found.level.figures["max_abs"]
            return Cause("image-normalisation", (), residual, explanation, 1.0)
    return None


def _masked_attention(judged: Judged, target: Target) -> Cause | None:
    network, numbers = judged.network, judged.numbers
    if network is None or numbers is None:
        return None
    probabilities = torch.ones_like(network.weights["attn_mask_probs"])
    masked = network.with_weights({"attn_mask_probs": probabilities})
    theirs = computed_by(masked, target.recorded.pixels)
    found = judge_outputs(numbers.outputs, theirs, target.tolerance)
    if found.level.status != "passed":
        return None
    explanation = "the file computes what the reference model computes with masked attention on"
    return Cause("masked-attention-on", ("attn_mask_probs",), None, explanation, 1.0)


def _other_network(judged: Judged, target: Target) -> Cause | None:
    """What has to be changed in the reference model so that it computes what the file does."""
    network, numbers = judged.network, judged.numbers
    if network is None or numbers is None:
        return None
    outputs = {"pixels": target.recorded.pixels, **numbers.outputs}
    computed = replace(target.recorded, tensors=outputs)
    cause, _ = diagnose(
        network, computed, target.tolerance, None, {}, None, expected="what the file computes"
    )
    if cause is None or cause.explained != 1.0:
        return None
    return replace(cause, explanation=f"the file differs from config.json: {cause.explanation}")


def _residual(judged: Judged) -> str:
    return f": largest difference {judged.level.figures['max_abs']:.2g}"


# the causes of a difference that does not come from the weights, each with what looks for it
_CAUSES: tuple[Callable[[Judged, Target], Cause | None], ...] = (
    _provider,
    _overflow,
    _inputs,
    _masked_attention,
    _other_network,
)
