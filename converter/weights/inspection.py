"""Inspects a file of weights: its layout, its tensors, and whether it is a delta."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from converter.errors import PlanError
from converter.weights.layouts import EOMT_TUE, plain_name, recognise
from converter.weights.states import rename_to_layout
from converter.weights.tensorfiles import ShardedTensorFile, TensorFile

WeightsKind = Literal["delta", "absolute"]


@dataclass(frozen=True)
class Sign:
    """One sign that EoMT weights are a delta to a backbone, or that they are absolute.

    Attributes:
        finding: what was found, in a sentence.
        speaks_for: the kind of weights that it is a sign of.
    """

    finding: str
    speaks_for: WeightsKind

    def to_dict(self) -> dict[str, Any]:
        """The sign as JSON shows it."""
        return {"finding": self.finding, "speaks_for": self.speaks_for}


@dataclass(frozen=True)
class Inspection:
    """What was found in a file of weights.

    Attributes:
        format: ``safetensors`` or ``torch``.
        layout: name of the layout; None if it is not a supported one.
        title: the layout in words.
        weights: whether the weights are a delta or absolute; None if that cannot be decided.
        evidence: the signs that decide this.
        notes: sentences on names that differ from the layout's, and on copies of the weights.
        tensors: dtype and shape of every tensor, by name.
        parameters: number of elements of all tensors.
        wrong_checksums: records of a torch file whose CRC-32 differs from the zip directory's.
    """

    format: str
    layout: str | None
    title: str
    weights: WeightsKind | None
    evidence: tuple[Sign, ...]
    notes: tuple[str, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    parameters: int
    wrong_checksums: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON shows it."""
        return {
            "format": self.format,
            "layout": self.layout,
            "weights": self.weights,
            "evidence": [sign.to_dict() for sign in self.evidence],
            "notes": list(self.notes),
            "parameters": self.parameters,
            "wrong_checksums": list(self.wrong_checksums),
            "tensors": {
                name: {"dtype": dtype, "shape": list(shape)}
                for name, (dtype, shape) in self.tensors.items()
            },
        }


def inspect(file: TensorFile | ShardedTensorFile) -> Inspection:
    """Inspects a file's header, the small tensors that distinguish a delta, and the checksums.

    The file's tensors get the names of the layout; the inspection has those in the file.

    Raises:
        UnreadableFileError: one of these tensors cannot be read.
    """
    tensors = {**file.tensors, **file.nested}
    try:
        choice = rename_to_layout(file, None)
        notes = tuple(choice.notes()) if choice else ()
    except PlanError as error:
        notes = (error.message,)
    layout = recognise(file.tensors)
    evidence = signs_of_a_delta(file) if layout is EOMT_TUE else ()
    kind: WeightsKind | None = decide(evidence)
    if layout is not None and layout is not EOMT_TUE:
        kind = "absolute"
    return Inspection(
        format=file.format,
        layout=layout.name if layout else None,
        title=layout.title if layout else "not a supported layout",
        weights=kind,
        evidence=evidence,
        notes=notes,
        tensors={name: (info.dtype, info.shape) for name, info in tensors.items()},
        parameters=sum(info.size for info in tensors.values()),
        wrong_checksums=file.wrong_checksums(),
    )


def signs_of_a_delta(file: TensorFile | ShardedTensorFile) -> tuple[Sign, ...]:
    """Signs that weights in TU/e's layout are a delta to a backbone, or that they are absolute."""
    import numpy as np

    names = {plain_name(name): name for name in file.tensors}
    signs = []
    if "network.encoder.pixel_std" in names:
        std = file.read(names["network.encoder.pixel_std"]).reshape(-1)
        values = ", ".join(f"{value:g}" for value in std[:3])
        if not std.any():
            finding = f"pixel_std is {values}: no difference from the backbone's"
            signs.append(Sign(finding, "delta"))
        elif (std > 0).all():
            finding = f"pixel_std is {values}: a standard deviation of pixels"
            signs.append(Sign(finding, "absolute"))

    norms = [
        name
        for plain, name in names.items()
        if plain.startswith("network.encoder.backbone.")
        and plain.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
    ]
    if norms:
        weights = np.concatenate([file.read(name).reshape(-1) for name in norms])
        mean, positive = float(weights.mean()), float((weights > 0).mean())
        finding = f"layer norm weights have the mean {mean:.2f}, {positive:.0%} are positive"
        # Trained layer norm weights are positive; the changes by training have either sign.
        if positive > 0.95 and mean > 0.1:
            signs.append(Sign(finding, "absolute"))
        elif positive < 0.8:
            signs.append(Sign(finding, "delta"))
    return tuple(signs)


def decide(evidence: Sequence[Sign]) -> WeightsKind | None:
    """The kind of weights that all signs agree on; None if there are no signs or they are mixed."""
    kinds = {sign.speaks_for for sign in evidence}
    return kinds.pop() if len(kinds) == 1 else None
