"""The plan of a conversion: a table with one row for every tensor of the model.

It is made only from names and shapes, before any weight is read. It is complete, or making it
fails: a row uses every input tensor, or the tensor is dropped for a reason, and every tensor that
the model needs has exactly one row.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from converter.configs import NO_OBJECT_WEIGHT
from converter.errors import PlanError
from converter.weights.backbones import (
    config_from_shapes,
    describe,
    size_in,
    size_of,
)
from converter.weights.headers import ITEM_SIZES, TensorInfo
from converter.weights.layouts import (
    EOMT_LIGHTLY,
    EOMT_TRANSFORMERS,
    Kind,
    Layout,
    Part,
    Translation,
    model_shapes,
    recognise,
    translate,
)
from reference_model.config import Dinov3Config, EomtDinov3Config

# where a tensor comes from: a backbone, a delta to it, or absolute weights, which need no backbone
Source = Literal["backbone", "delta", "weights"]
Operation = Literal["add", "subtract", "copy", "join", "minus one", "zeros", "class weights"]
Tensors = Mapping[str, TensorInfo]

# tensors that backbone files leave out if they are all zeros
_ZERO_IF_MISSING = ("attention.q_proj.bias", "attention.v_proj.bias")

# how many wrong tensors an error names
_MAX_SHOWN = 5


@dataclass(frozen=True)
class Operand:
    """A tensor of a source, or a part of a fused one.

    Attributes:
        source: which file it is in.
        part: where it is in that file; None for zeros that the file leaves out.
    """

    source: Source
    part: Part | None

    def __str__(self) -> str:
        return f"{self.source}:{self.part}" if self.part else "zeros"


@dataclass(frozen=True)
class Row:
    """How one tensor of a model, or of its delta, is made.

    Attributes:
        name: its name; in a model the canonical one.
        shape: its shape.
        dtype: its element type, as safetensors names it.
        operation: ``add`` (the operands, in float32), ``subtract`` (the second operand from the
            first, so that adding gives the first again), ``copy`` (the operand), ``join`` (the
            operands, as equal parts of the first axis), ``minus one``, ``zeros``, or ``class
            weights`` (ones, and the weight of "no object" last).
        operands: the tensors that it is made from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    operation: Operation
    operands: tuple[Operand, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def recipe(self) -> str:
        """The recipe in one line, such as ``backbone:norm.bias + delta:network.q.weight``."""
        match self.operation:
            case "zeros":
                return "zeros"
            case "class weights":
                return f"ones, {NO_OBJECT_WEIGHT} last"
            case "minus one":
                return f"{self.operands[0]} - 1"
            case "join":
                return ", ".join(str(operand) for operand in self.operands)
            case "subtract":
                return " - ".join(str(operand) for operand in self.operands)
            case _:
                return " + ".join(str(operand) for operand in self.operands)

    @property
    def renamed(self) -> bool:
        """Whether its name differs from the name in a file that it comes from."""
        return any(operand.part and operand.part.name != self.name for operand in self.operands)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class DroppedTensor:
    """An input tensor that no row uses, and why."""

    operand: Operand
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The tensor as JSON shows it."""
        return {"tensor": str(self.operand), "reason": self.reason}


@dataclass(frozen=True)
class Plan:
    """A complete plan.

    Attributes:
        rows: in the order in which they are written.
        dropped: input tensors that are left out.
        config: the model's: the backbone's configuration with the sizes of EoMT's weights.
    """

    rows: tuple[Row, ...]
    dropped: tuple[DroppedTensor, ...]
    config: EomtDinov3Config

    def without(self, source: Source, unused: Iterable[str]) -> "Plan":
        """The same plan for a file that also has tensors of other copies of the weights."""
        dropped = (
            DroppedTensor(Operand(source, Part(name)), "not of the copy that is converted")
            for name in unused
        )
        return replace(self, dropped=(*self.dropped, *dropped))

    def counts(self) -> dict[str, int]:
        """How many tensors are added, copied, filled, renamed and dropped."""
        operations = Counter(row.operation for row in self.rows)
        return {
            "tensors": len(self.rows),
            "added": operations["add"],
            "copied": operations["copy"],
            "filled": operations["zeros"] + operations["class weights"],
            "renamed": sum(row.renamed for row in self.rows),
            "dropped": len(self.dropped),
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON shows it."""
        return {
            "counts": self.counts(),
            "rows": [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "dtype": row.dtype,
                    "operation": row.operation,
                    "recipe": row.recipe,
                }
                for row in self.rows
            ],
            "dropped": [dropped.to_dict() for dropped in self.dropped],
        }


def make_plan(
    eomt: Tensors,
    backbone: Tensors | None,
    config: Dinov3Config | None,
    *,
    backbone_layout: Layout | None = None,
    dtype: str = "F32",
    num_blocks: int | None = None,
) -> Plan:
    """Plans a conversion.

    Args:
        eomt: tensors of the file with EoMT's weights.
        backbone: tensors of the backbone that they are a delta to; None if they are absolute.
        config: the backbone's config.json; None to read the sizes from the shapes, which works
            for the published backbones.
        backbone_layout: the backbone's layout; by default it is recognised by the tensor names.
        dtype: element type of the model, as safetensors names it.
        num_blocks: how many layers process queries, if no tensor shows it.

    Raises:
        PlanError: a tensor is missing, unexpected or has a wrong shape, or a file has a wrong or
            unsupported layout. The message names tensors, shapes and the likeliest cause.
    """
    base = None
    if backbone is not None:
        base = _Weights("backbone", backbone, "backbone", backbone_layout)
    head = _Weights("delta" if base else "weights", eomt, "eomt")
    if base and head.translation.layout is EOMT_TRANSFORMERS:
        raise PlanError(
            f"The {head.source} is {EOMT_TRANSFORMERS.title}: it is converted already.",
            "Convert it again with --weights absolute, or check it with eomt-convert verify.",
        )
    if base and head.translation.layout is EOMT_LIGHTLY:
        raise PlanError(
            f"The {head.source} is {EOMT_LIGHTLY.title}, which are absolute.",
            "Leave out --weights delta.",
        )
    if config is None:
        config = config_from_shapes(base.translation if base else head.translation)
    cause = _likeliest_cause(base, head, config)
    model = _model_config(config, head, num_blocks, cause)

    rows, problems = [], []
    needed = model_shapes(model)
    for name, shape in sorted(needed.items()):
        in_backbone = name.startswith(("embeddings.", "layers.", "layernorm."))
        row = _row(name, shape, dtype, [base, head] if base and in_backbone else [head])
        if isinstance(row, Row):
            rows.append(row)
        else:
            problems += row
    sources = [base, head] if base else [head]
    for weights in sources:
        problems += weights.left_over(needed)
    if problems:
        raise PlanError(_list_of(problems), cause)
    dropped = tuple(entry for weights in sources for entry in weights.dropped)
    return Plan(tuple(rows), dropped, model)


class _Weights:
    """The tensors of a source under their canonical names."""

    def __init__(
        self, source: Source, tensors: Tensors, kind: Kind, layout: Layout | None = None
    ) -> None:
        self.source = source
        layout = layout or recognise(tensors)
        wanted = "a DINOv3 backbone" if kind == "backbone" else "EoMT weights"
        if layout is None:
            first = f"{', '.join(list(tensors)[:3])}, ..." if tensors else "no tensors."
            raise PlanError(
                f"The {source}'s layout is not supported: it has {first}",
                f"Expected {wanted}. eomt-convert inspect shows what is in a file.",
            )
        if layout.kind != kind:
            raise PlanError(
                f"The {source} is {layout.title}, not {wanted}.",
                "Are --delta and --backbone swapped?",
            )
        self.translation: Translation = translate(tensors, layout)

    @property
    def dropped(self) -> list[DroppedTensor]:
        return [
            DroppedTensor(Operand(self.source, part), reason)
            for part, reason in self.translation.dropped
        ]

    def operand(self, name: str, shape: tuple[int, ...]) -> Operand | str:
        """Where a canonical tensor is, or a sentence on what is wrong with it."""
        part = self.translation.parts.get(name)
        if part is None:
            if self.source == "backbone" and name.endswith(_ZERO_IF_MISSING):
                return Operand(self.source, None)
            return f"{name} {list(shape)} is missing from the {self.source}"
        found = self.translation.shape(name)
        if found != shape:
            return (
                f"{part} in the {self.source} has the shape {list(found or ())}, expected "
                f"{list(shape)}"
            )
        dtype = self.translation.tensors[part.name].dtype
        if not dtype.startswith(("F", "BF")):
            return f"{part} in the {self.source} has dtype {dtype}, expected floating point numbers"
        return Operand(self.source, part)

    def left_over(self, needed: Mapping[str, tuple[int, ...]]) -> list[str]:
        extra = [part for name, part in self.translation.parts.items() if name not in needed]
        extra += [Part(name) for name in self.translation.unknown]
        return [
            f"{part} {list(self.translation.tensors[part.name].shape)} in the {self.source} is "
            "unexpected: the model has no such tensor"
            for part in extra
        ]


def _row(name: str, shape: tuple[int, ...], dtype: str, sources: list[_Weights]) -> Row | list[str]:
    """The row of a tensor, or sentences on why it cannot be made."""
    if name == "attn_mask_probs":
        return Row(name, shape, dtype, "zeros", ())
    if name == "criterion.empty_weight" and name not in sources[0].translation.parts:
        return Row(name, shape, dtype, "class weights", ())
    found = [source.operand(name, shape) for source in sources]
    problems = [problem for problem in found if isinstance(problem, str)]
    if problems:
        return problems
    operands = tuple(operand for operand in found if isinstance(operand, Operand))
    return Row(name, shape, dtype, "add" if len(operands) == 2 else "copy", operands)


def _model_config(
    backbone: Dinov3Config, head: _Weights, num_blocks: int | None, cause: str
) -> EomtDinov3Config:
    """The model's configuration: the backbone's with the sizes of EoMT's weights."""
    weights = head.translation
    # the tensor itself is replaced by zeros, but its length is the number of blocks
    blocks = next(
        (
            info.shape[0]
            for name, info in weights.tensors.items()
            if name.endswith("attn_mask_probs") and len(info.shape) == 1
        ),
        num_blocks,
    )
    queries, classes = weights.shape("query.weight"), weights.shape("class_predictor.weight")
    if blocks is None:
        raise PlanError(f"attn_mask_probs is missing from the {head.source}.", cause)
    if not queries or not classes or classes[0] < 2:
        raise PlanError(
            f"The heads of the {head.source} have impossible shapes: {list(queries or ())} for "
            f"queries, {list(classes or ())} for classes.",
            cause,
        )
    try:
        return EomtDinov3Config.from_dict(
            {
                **asdict(backbone),
                "image_size": backbone.patch_size,  # no tensor depends on it
                "num_queries": queries[0],
                "num_blocks": blocks,
                "num_labels": classes[0] - 1,
            }
        )
    except ValueError as error:
        raise PlanError(f"The {head.source} has impossible sizes: {error}.", cause) from error


def _likeliest_cause(base: _Weights | None, head: _Weights, config: Dinov3Config) -> str:
    wanted = size_of(head.translation)
    found = size_of(base.translation) if base else wanted
    if found != size_in(config):
        return (
            f"The backbone's config.json describes {describe(size_in(config))}, its weights are "
            f"those of {describe(found)}: they do not belong together."
        )
    if found != wanted:
        return (
            f"The delta was made for another backbone: it fits {describe(wanted)}, the given "
            f"backbone is {describe(found)}."
        )
    return "A file may be incomplete, or saved by another version of the training code."


def _list_of(problems: list[str]) -> str:
    shown = [f"  {problem}" for problem in problems[:_MAX_SHOWN]]
    if len(problems) > _MAX_SHOWN:
        shown.append(f"  and {len(problems) - _MAX_SHOWN} more")
    return "The weights do not add up to a model:\n" + "\n".join(shown)
