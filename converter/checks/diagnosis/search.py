"""Finds out why a model is wrong: undoes one possible fault after another and runs the result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from converter.checks.comparison import RIGHT, Tolerance
from converter.checks.diagnosis.by_value import Reference, faults_by_value, wrong_tensors
from converter.checks.diagnosis.hypotheses import HYPOTHESES, Case, Explanation
from converter.checks.diagnosis.stages import Network, Stage, cut
from converter.checks.recorded import Recorded
from converter.checks.verdict import Cause, Trial

# how many faults are looked for, one after another
_MAX_FAULTS = 3


@dataclass(frozen=True)
class _Outcome:
    """The result of undoing a fault.

    Attributes:
        name: name of the fault.
        explanation: what was undone.
        left: the case without the fault.
        mended: how many of the stages that were off are now as accurate as in correct models, not
            merely within their tolerance.
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
        """Whether it explains at least a part."""
        return self.complete or self.mended > 0 or self.explanation.by_value

    @property
    def is_undone(self) -> bool:
        """Whether the model was run without the fault, or there is no recording to run it on."""
        undone = self.explanation.repaired is not None and self.explanation.stages is None
        return undone or self.left.recorded is None


def diagnose(
    network: Network,
    recorded: Recorded | None,
    tolerance: Tolerance,
    stages: tuple[Stage, ...] | None,
    digests: Mapping[str, str],
    reference: Reference | None,
    *,
    expected: str = "the recording",
) -> tuple[Cause | None, tuple[Trial, ...]]:
    """Looks for the fault in a model that fails verification.

    Every hypothesis is tried in turn, until one explains all of the difference. If none does, the
    fault that explains most is undone, and the other hypotheses are tried on the rest. A fault is
    named only if undoing it makes parts of the network as accurate as in correct models, or if the
    tensors' values prove it.

    Args:
        network: the model.
        recorded: the recording; None if there is none, or if the model's numbers are right. One
            that was computed in 16 bits is not used: its rounding puts every part off.
        tolerance: how far the numbers may be off.
        stages: the network's parts with their tolerances; None for those of float32 weights.
        digests: SHA-256 of its tensors.
        reference: what its tensors should be, if known.
        expected: what ``recorded`` is, for sentences.

    Returns:
        The cause, if one was found, and everything that was tried.
    """
    faults = faults_by_value(network.weights, digests, reference) if reference else {}
    wrong = frozenset(wrong_tensors(network.weights, digests, reference) if reference else ())
    if bool((network.weights["attn_mask_probs"] > 0).any()):  # wrong even if the sources have it
        wrong |= {"attn_mask_probs"}
    reason = "All tensors and numbers that were compared are right."
    if recorded and recorded.origin.computed_in != "float32":
        coarse = recorded.origin.computed_in
        reason = f"The recording was computed in {coarse}, too coarsely to look for faults with it."
        recorded = None
    if recorded is None and not wrong:
        return None, not_tried(reason)
    if recorded is None:
        stages = ()
    elif stages is None:
        stages = cut(recorded, network.config)
    case = _measured(Case(network, recorded, tolerance, stages, {}, reference, faults, wrong))
    trials = {trial.name: trial for trial in not_tried("The cause was already found.")}
    found: list[_Outcome] = []
    left = case
    while len(found) < _MAX_FAULTS and not (found and found[-1].complete):
        best = _try_all(left, trials, first=not found)
        if best is None:
            break
        found.append(best)
        left = best.left
    if not found:
        return None, tuple(trials.values())
    for outcome in found:
        alone = outcome.complete and len(found) == 1 and outcome.is_undone
        trials[outcome.name] = replace(
            trials[outcome.name],
            status="explains all" if alone else "explains part",
            explained=_share(outcome, case),
        )
    cause = _cause(found, case, expected)
    trials[cause.name] = replace(trials[cause.name], reason=cause.explanation)
    return cause, tuple(trials.values())


def _share(outcome: _Outcome, case: Case) -> float | None:
    """The share of the stages that are off or, if none is, of the wrong tensors it explains."""
    if case.failing:
        return outcome.mended / len(case.failing)
    if case.wrong:
        return len(case.wrong.intersection(outcome.explanation.tensors)) / len(case.wrong)
    return None


def not_tried(reason: str) -> tuple[Trial, ...]:
    """A trial for every hypothesis, with the reason why it was not tried."""
    return tuple(Trial(name, "not tried", None, reason) for name in HYPOTHESES)


def _measured(case: Case) -> Case:
    differences = {stage.name: stage.difference(case.network) for stage in case.stages}
    return replace(case, differences=differences)


def _try_all(case: Case, trials: dict[str, Trial], *, first: bool) -> _Outcome | None:
    """The outcome that explains all or, if none does, most; adds what was tried to ``trials``."""
    best: _Outcome | None = None
    # faults that the values show come first, because they need no search
    for name in sorted(HYPOTHESES, key=lambda name: name not in case.faults):
        proposal = HYPOTHESES[name](case)
        if isinstance(proposal, str):
            if first:
                trials[name] = Trial(name, "not tried", None, proposal)
            continue
        outcome = _try(name, proposal, case)
        if first or outcome.counts:
            reason = f"Tried: {proposal.action}."
            residual = _number(outcome.residual)
            trials[name] = Trial(name, "explains nothing", residual, reason, explained=0.0)
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
    left = replace(
        case,
        faults={fault: tensors for fault, tensors in faults.items() if tensors},
        wrong=case.wrong.difference(explanation.tensors),
    )
    if explanation.repaired is None:
        return _try_without_repair(name, explanation, left)
    left = _measured(
        replace(left, network=explanation.repaired, stages=explanation.stages or left.stages)
    )
    off = {stage.name for stage in case.failing}
    # a value fitted to noise also makes a stage a little better, so it must halve the difference
    right = {
        s.name
        for s in left.stages
        if left.differences[s.name] <= s.right
        and (left.differences[s.name] <= case.differences[s.name] / 2 or explanation.stages)
    }
    broken = [stage for stage in left.failing if stage.name not in off]
    return _Outcome(
        name,
        explanation,
        left,
        mended=0 if broken else len(off & right),
        residual=max((left.differences[stage] for stage in off), default=None),
        complete=not left.failing
        and off <= right
        # without a recording, only the tensors' values count
        and (case.recorded is not None or left.wrong < case.wrong)
        and _is_right(left, explanation),
    )


def _try_without_repair(name: str, explanation: Explanation, left: Case) -> _Outcome:
    """Counts the stages as explained that use the tensors of a fault that cannot be undone."""
    using = [
        stage.name
        for stage in left.failing
        if set(explanation.tensors).intersection(stage.tensors(left.network))
    ]
    stages = tuple(
        replace(stage, tolerance=math.inf) if stage.name in using else stage
        for stage in left.stages
    )
    complete = len(using) == len(left.failing) and not left.wrong
    if left.recorded:
        complete = complete and bool(using)
    return _Outcome(name, explanation, replace(left, stages=stages), len(using), None, complete)


def _is_right(case: Case, explanation: Explanation) -> bool:
    """Whether all tensors are right, and the network's outputs match the recorded ones."""
    if case.wrong or case.recorded is None or explanation.stages is not None:
        return not case.wrong
    return _residual(case.network, case.recorded, case.tolerance)[1]


def _residual(network: Network, recorded: Recorded, tolerance: Tolerance) -> tuple[float, bool]:
    """Largest difference of the network's outputs, and whether correct networks have as little."""
    outputs = network.run(recorded.pixels)
    largest, right = 0.0, True
    for name, output in outputs.items():
        theirs = recorded.tensors.get(name)
        if theirs is not None:
            difference = float((output[: len(theirs)] - theirs).abs().max())
            largest = max(largest, difference if math.isfinite(difference) else math.inf)
            right = right and difference <= RIGHT * tolerance.of(theirs)
    return largest, right


def _number(residual: float | None) -> float | None:
    """A residual as JSON has it: None for NaN and infinity."""
    return residual if residual is not None and math.isfinite(residual) else None


def _cause(found: list[_Outcome], case: Case, expected: str) -> Cause:
    first, last = found[0], found[-1]
    explanation = first.explanation
    residual = None
    if case.recorded and explanation.repaired:
        residual, _ = _residual(explanation.repaired, case.recorded, case.tolerance)
    sentence = explanation.action
    if explanation.stages is not None:
        sentence = (
            f"{sentence} moves {_parts(first, case)} as far as they are off; only the sources can "
            "show that nothing else is wrong"
        )
    elif residual is None and explanation.repaired:
        sentence += " makes all tensors what the sources give"
    elif case.recorded and residual is not None:
        before, _ = _residual(case.network, case.recorded, case.tolerance)
        does = f"reproduces {expected}" if first.complete else "explains a part"
        if any(stage.mean_square for stage in case.stages):
            does += ", as far as rounded weights show it"
        sentence += f" {does}: largest difference {residual:.2g}, before it was {before:.2g}"
        if not first.complete:
            sentence += f", with {_parts(first, case)} right"
    if len(found) > 1:
        others = " and ".join(outcome.name for outcome in found[1:])
        sentence += f"; {others} explains {'the rest' if last.complete else 'another part'}"
    return Cause(first.name, explanation.tensors, _number(residual), sentence, _share(first, case))


def _parts(outcome: _Outcome, case: Case) -> str:
    """How many of the parts that are off an outcome repairs, in words."""
    return f"{outcome.mended} of {len(case.failing)} parts"
