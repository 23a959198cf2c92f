"""Why a model is not right: hypotheses, each tried by undoing its fault and running the result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from converter.checks.by_value import Reference, faults_by_value
from converter.checks.comparison import Tolerance
from converter.checks.hypotheses import HYPOTHESES, ROUNDING_MARGIN, Case, Explanation
from converter.checks.recorded import Recorded
from converter.checks.stages import Network, cut
from converter.checks.verdict import Cause, Trial

# Faults that are looked for one behind the other.
_MOST_FAULTS = 3


@dataclass(frozen=True)
class _Outcome:
    """What came of undoing a fault.

    Attributes:
        name: of the fault.
        explanation: what was undone.
        left: the case without it.
        mended: how many of the stages that were off are not any more.
        residual: largest difference left in the stages that were off; None if nothing was run.
        complete: whether nothing is off any more.
    """

    name: str
    explanation: Explanation
    left: Case
    mended: int
    residual: float | None
    complete: bool

    @property
    def counts(self) -> bool:
        """Whether it accounts for something."""
        return self.complete or self.mended > 0 or self.explanation.by_value


def diagnose(
    network: Network,
    recorded: Recorded | None,
    tolerance: Tolerance,
    digests: Mapping[str, str],
    reference: Reference | None,
) -> tuple[Cause | None, tuple[Trial, ...]]:
    """Looks for the fault of a model that is not right.

    Every hypothesis is tried in turn, until one accounts for all of the difference. If none does,
    the one that accounts for most is undone, and the others are tried on what is left.

    Args:
        network: the model.
        recorded: what it should put out; None where there is no recording, or its numbers are
            right.
        tolerance: how far the numbers may be off.
        digests: SHA-256 of its tensors.
        reference: what its tensors should be, where that is known.

    Returns:
        The cause, if one was found, and everything that was tried.
    """
    faults = faults_by_value(network.weights, digests, reference) if reference else {}
    stages = cut(recorded, network.config, tolerance) if recorded else ()
    case = _measured(Case(network, recorded, tolerance, stages, {}, reference, faults))
    trials = {trial.name: trial for trial in not_tried("The cause was found before.")}
    found: list[_Outcome] = []
    while len(found) < _MOST_FAULTS and not (found and found[-1].complete):
        best = _try_all(case, trials, first=not found)
        if best is None:
            break
        found.append(best)
        case = best.left
    if not found:
        return None, tuple(trials.values())
    for outcome in found:
        alone = outcome.complete and len(found) == 1
        trials[outcome.name] = replace(
            trials[outcome.name], status="explains all" if alone else "explains part"
        )
    cause = _cause(found, recorded, tolerance)
    trials[cause.name] = replace(trials[cause.name], reason=cause.explanation)
    return cause, tuple(trials.values())


def not_tried(reason: str) -> tuple[Trial, ...]:
    """What to say of every hypothesis where none can be tried."""
    return tuple(Trial(name, "not tried", None, reason) for name in HYPOTHESES)


def _measured(case: Case) -> Case:
    differences = {stage.name: stage.difference(case.network) for stage in case.stages}
    return replace(case, differences=differences)


def _try_all(case: Case, trials: dict[str, Trial], *, first: bool) -> _Outcome | None:
    """The outcome that accounts for all or, if none does, for most; notes what was tried."""
    best: _Outcome | None = None
    # what values tell needs no search
    for name in sorted(HYPOTHESES, key=lambda name: name not in case.faults):
        proposal = HYPOTHESES[name](case)
        if isinstance(proposal, str):
            if first:
                trials[name] = Trial(name, "not tried", None, proposal)
            continue
        outcome = _try(name, proposal, case)
        if first or outcome.counts:
            reason = f"Tried: {proposal.action}."
            trials[name] = Trial(name, "explains nothing", _number(outcome.residual), reason)
        if outcome.complete:
            return outcome
        if outcome.counts and (best is None or outcome.mended > best.mended):
            best = outcome
    return best


def _try(name: str, explanation: Explanation, case: Case) -> _Outcome:
    faults = {
        fault: {name: right for name, right in tensors.items() if name not in explanation.tensors}
        for fault, tensors in case.faults.items()
    }
    left = replace(case, faults={fault: tensors for fault, tensors in faults.items() if tensors})
    if explanation.repaired is None:
        return _try_without_repair(name, explanation, left)
    left = replace(left, network=explanation.repaired)
    if explanation.noise:
        left = _with_allowance(left, explanation.noise)
    left = _measured(left)
    off = [stage.name for stage in case.failing]
    broken = [stage for stage in left.failing if stage.name not in off]
    return _Outcome(
        name,
        explanation,
        left,
        mended=0 if broken else len(off) - len(left.failing),
        residual=max((left.differences[stage] for stage in off), default=None),
        complete=not left.failing and _is_right(left, explanation),
    )


def _try_without_repair(name: str, explanation: Explanation, left: Case) -> _Outcome:
    """Takes the stages for explained that use the tensors of a fault that cannot be undone."""
    using = [
        stage.name
        for stage in left.failing
        if set(explanation.tensors).intersection(stage.tensors(left.network))
    ]
    stages = tuple(
        replace(stage, tolerance=math.inf) if stage.name in using else stage
        for stage in left.stages
    )
    complete = 0 < len(using) == len(left.failing) if left.recorded else not left.faults
    return _Outcome(name, explanation, replace(left, stages=stages), len(using), None, complete)


def _with_allowance(case: Case, noise: Network) -> Case:
    """The case with stages that may be off by as much as errors of this size make them."""
    stages = []
    for stage in case.stages:
        usual = float((stage.run(noise) - stage.run(case.network)).abs().max())
        stages.append(replace(stage, tolerance=max(stage.tolerance, ROUNDING_MARGIN * usual)))
    return replace(case, stages=tuple(stages))


def _is_right(case: Case, explanation: Explanation) -> bool:
    """Whether a whole network gives what was recorded, or its tensors are what they should be."""
    if case.recorded is None:
        return not case.faults
    return (
        explanation.noise is not None or _residual(case.network, case.recorded, case.tolerance)[1]
    )


def _residual(network: Network, recorded: Recorded, tolerance: Tolerance) -> tuple[float, bool]:
    """Largest difference of a whole network's outputs, and whether all are within tolerance."""
    outputs = network.run(recorded.pixels)
    largest, right = 0.0, True
    for name, output in outputs.items():
        theirs = recorded.tensors.get(name)
        if theirs is not None:
            difference = float((output[: len(theirs)] - theirs).abs().max())
            largest = max(largest, difference)
            right = right and difference <= tolerance.of(theirs)
    return largest, right


def _number(residual: float | None) -> float | None:
    """A residual as JSON has it: None where it is no number."""
    return residual if residual is not None and math.isfinite(residual) else None


def _cause(found: list[_Outcome], recorded: Recorded | None, tolerance: Tolerance) -> Cause:
    first, last = found[0], found[-1]
    residual = None
    if recorded and first.explanation.repaired:
        residual, _ = _residual(first.explanation.repaired, recorded, tolerance)
    action = first.explanation.action
    if first.explanation.repaired is None:
        sentence = action
    elif residual is None:
        sentence = f"{action} makes the tensors what they should be"
    elif first.explanation.noise:
        sentence = f"{action} moves the outputs as far as they are off, by up to {residual:.2g}"
    elif first.complete:
        sentence = f"{action} reproduces the recording: largest difference {residual:.2g}"
    else:
        sentence = f"{action} explains a part: largest difference left {residual:.2g}"
    if len(found) > 1:
        others = " and ".join(outcome.name for outcome in found[1:])
        sentence += f"; {others} explains {'the rest' if last.complete else 'another part'}"
    return Cause(first.name, first.explanation.tensors, _number(residual), sentence)
