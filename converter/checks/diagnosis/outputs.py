"""Says what is wrong with outputs whose network is unknown."""

from collections.abc import Callable, Mapping

from torch import Tensor

from converter.checks.comparison import Tolerance, compare
from converter.checks.numbers import Numbers, first_difference, judge_outputs
from converter.checks.outputs_file import LOGITS, layer_names
from converter.checks.recorded import Recorded
from converter.checks.verdict import FirstDifference

# What programs do to logits, and what the outputs are then, in words. The functions take recorded
# logits: (batch, queries, height, width) or (batch, queries, classes + 1).
_MISTAKES: Mapping[str, Mapping[str, Callable[[Tensor], Tensor]]] = {
    "mask_logits": {
        "are the sigmoid of the recorded logits": lambda logits: logits.sigmoid(),
        "have height and width swapped": lambda logits: logits.mT,
        "have the queries as their last axis": lambda logits: logits.movedim(1, -1),
    },
    "class_logits": {
        "are the softmax of the recorded logits": lambda logits: logits.softmax(-1),
        "have queries and classes swapped": lambda logits: logits.mT,
    },
}


def explain(
    judged: Numbers, recorded: Recorded, tolerance: Tolerance
) -> tuple[str, FirstDifference | None]:
    """Finds what was done to right outputs or, if nothing known was, where they first differ.

    Args:
        judged: outputs that differ from the recording.
        recorded: the recording.
        tolerance: how far apart they may be.

    Returns:
        A sentence on what was done, or on why the first difference is unknown; empty if it is
        known. And the first difference.
    """
    if mistake := _mistake(judged, recorded, tolerance) or _other_order(
        judged, recorded, tolerance
    ):
        return mistake, None
    failed = [name for name, comparison in judged.compared.items() if comparison.failure]
    if not failed or not judged.comparable:
        return "", None
    unknown = _why_unknown(failed[0], judged, recorded, tolerance)
    return unknown, None if unknown else first_difference(judged.compared, None)


def _mistake(judged: Numbers, recorded: Recorded, tolerance: Tolerance) -> str:
    """What was done to the logits, in sentences; empty unless it explains every difference."""
    found = []
    for name, comparison in judged.compared.items():
        if comparison.failure:
            explained = [
                f"{name} {words}."
                for words, change in _MISTAKES.get(name, {}).items()
                if not compare(
                    name, judged.outputs[name], change(recorded.tensors[name]), tolerance
                ).failure
            ]
            if not explained:
                return ""
            found.append(explained[0])
    return " ".join(found)


def _other_order(judged: Numbers, recorded: Recorded, tolerance: Tolerance) -> str:
    """A sentence if the outputs are right, but for the recorded inputs in another order."""
    count = len(recorded.pixels)
    if not judged.comparable or any(len(output) != count for output in judged.outputs.values()):
        return ""
    classes = judged.outputs["class_logits"]
    order = [
        int((classes - theirs).abs().flatten(1).amax(1).argmin())
        for theirs in recorded.tensors["class_logits"]
    ]
    ordered = {name: output[order] for name, output in judged.outputs.items()}
    if len(set(order)) < count or (
        judge_outputs(ordered, recorded, tolerance).level.status == "failed"
    ):
        return ""
    return "The outputs are right for the recorded inputs in another order."


def _why_unknown(first: str, judged: Numbers, recorded: Recorded, tolerance: Tolerance) -> str:
    """Why it is unknown where a difference begins, in a sentence; empty if it is known.

    Args:
        first: the first tensor that differs.
        judged: the outputs.
        recorded: the recording.
        tolerance: how far apart they may be.
    """
    layers = layer_names(recorded)
    before = layers[: layers.index(first)] if first in layers else layers
    if first == "patch_embeddings":
        return ""
    if not before:
        return "The recording has no outputs of layers that would show where it begins."
    compared = [name for name in before if name in judged.compared]
    missing = before[before.index(compared[-1]) + 1 :] if compared else before
    if missing:
        names = " to ".join(dict.fromkeys((missing[0], missing[-1])))
        return f"Outputs that would show where it begins are missing in the file: {names}."
    count = len(recorded.tensors[before[-1]])
    ours, theirs = judged.outputs[first][:count], recorded.tensors[first][:count]
    if first in LOGITS and not compare(first, ours, theirs, tolerance).failure:
        return (
            f"It is in the logits of other inputs than the first {count}, and layers were recorded "
            "for these only."
        )
    return ""
