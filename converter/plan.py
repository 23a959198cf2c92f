"""The plan of a conversion: a table with one row for every tensor of the model.

It is made from names and shapes alone, before a weight is read, and is complete or is not made:
every input tensor is used by a row or dropped for a reason, and every tensor that the model needs
has exactly one row.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converter.configs import NO_OBJECT_WEIGHT, BackboneConfig, HeadSizes
from converter.errors import PlanError
from converter.layouts import MODEL, Dropped, Kind, Layout, recognise, split_number
from converter.tensorfiles import TensorInfo

Source = Literal["backbone", "delta"]
Operation = Literal["add", "copy", "zeros", "class weights"]
Tensors = Mapping[str, TensorInfo]

# biases and parts that a backbone has or has not, by the field of its configuration that says so
_OPTIONAL = {
    "attention.q_proj.bias": "query_bias",
    "attention.k_proj.bias": "key_bias",
    "attention.v_proj.bias": "value_bias",
    "attention.o_proj.bias": "proj_bias",
    "mlp.up_proj.bias": "mlp_bias",
    "mlp.down_proj.bias": "mlp_bias",
    "mlp.gate_proj.weight": "use_gated_mlp",
    "mlp.gate_proj.bias": "use_gated_mlp",
}

# (hidden size, layers, gated MLP) of the published DINOv3 backbones
_KNOWN_SIZES = {
    (384, 12, False): "ViT-S",
    (384, 12, True): "ViT-S+",
    (768, 12, False): "ViT-B",
    (1024, 24, False): "ViT-L",
    (1280, 32, True): "ViT-H+",
    (4096, 40, True): "ViT-7B",
}

# of a long list of wrong tensors, this many are named
_SHOWN = 5


@dataclass(frozen=True)
class Operand:
    """A tensor of a source.

    Attributes:
        source: which file it is in.
        name: its name there.
    """

    source: Source
    name: str

    def __str__(self) -> str:
        return f"{self.source}:{self.name}"


@dataclass(frozen=True)
class Row:
    """How one tensor of the model comes about.

    Attributes:
        name: canonical name.
        shape: its shape.
        dtype: its element type, as safetensors names it.
        operation: ``add`` (the operands, in float32), ``copy`` (the operand), ``zeros``, or
            ``class weights`` (ones, and the weight of "no object" last).
        operands: what it is made from.
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
        """The recipe in one line, such as ``backbone:norm.bias + delta:network...norm.bias``."""
        match self.operation:
            case "zeros":
                return "zeros"
            case "class weights":
                return f"ones, {NO_OBJECT_WEIGHT} last"
            case _:
                return " + ".join(str(operand) for operand in self.operands)

    @property
    def renamed(self) -> bool:
        """Whether it has another name than in the file it comes from."""
        return any(operand.name != self.name for operand in self.operands)


@dataclass(frozen=True)
class DroppedTensor:
    """An input tensor that no row uses, and why."""

    operand: Operand
    reason: str


@dataclass(frozen=True)
class Plan:
    """A complete plan.

    Attributes:
        rows: in the order in which they are written.
        dropped: input tensors that are left out.
        heads: the sizes found in the weights.
    """

    rows: tuple[Row, ...]
    dropped: tuple[DroppedTensor, ...]
    heads: HeadSizes

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
            "dropped": [
                {"tensor": str(dropped.operand), "reason": dropped.reason}
                for dropped in self.dropped
            ],
        }


def make_plan(backbone: Tensors, delta: Tensors, config: BackboneConfig) -> Plan:
    """Plans the conversion of a delta to a backbone.

    Args:
        backbone: tensors of the backbone's file.
        delta: tensors of the delta's file.
        config: the backbone's config.json.

    Raises:
        PlanError: a tensor is missing, left over or of a wrong shape, or a file is of another
            layout than it should be. The message names tensors, shapes and the likeliest cause.
    """
    base = _Translated("backbone", backbone)
    head = _Translated("delta", delta)
    base.check_kind("backbone")
    head.check_kind("eomt")
    cause = _likeliest_cause(base, head, config)
    sizes = _head_sizes(head, cause)
    if config.num_hidden_layers > len(backbone):
        raise PlanError(
            f"config.json speaks of {config.num_hidden_layers} layers, the backbone's file has "
            f"{len(backbone)} tensors.",
            cause,
        )

    rows, problems = [], []
    needed = model_shapes(config, sizes)
    for name, shape in sorted(needed.items()):
        in_backbone = name.startswith(("embeddings.", "layers.", "layernorm."))
        row = _row(name, shape, [base, head] if in_backbone else [head])
        if isinstance(row, Row):
            rows.append(row)
        else:
            problems += row
    for translated in (base, head):
        problems += translated.left_over(needed)
    if problems:
        raise PlanError(_list_of(problems), cause)
    return Plan(tuple(rows), base.dropped + head.dropped, sizes)


def model_shapes(config: BackboneConfig, heads: HeadSizes) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model of these sizes has, by canonical name."""
    sizes = {
        "blocks": heads.num_blocks,
        "channels": config.num_channels,
        "classes + 1": heads.num_classes + 1,
        "hidden": config.hidden_size,
        "mlp": config.intermediate_size,
        "patch": config.patch_size,
        "queries": heads.num_queries,
        "registers": config.num_register_tokens,
    }
    shapes = {}
    for pattern, symbols in MODEL.items():
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in symbols)
        for name in _numbered(pattern, config):
            shapes[name] = shape
    return shapes


def _numbered(pattern: str, config: BackboneConfig) -> list[str]:
    prefix, _, tensor = pattern.partition("{}.")
    if not tensor:
        return [pattern]
    if prefix == "layers.":
        if not getattr(config, _OPTIONAL.get(tensor, ""), True) or (
            tensor == "mlp.gate_proj.bias" and not config.mlp_bias
        ):
            return []
        return [pattern.format(i) for i in range(config.num_hidden_layers)]
    return [pattern.format(i) for i in range(config.num_upscale_blocks)]


class _Translated:
    """The tensors of a source under their canonical names."""

    def __init__(self, source: Source, tensors: Tensors) -> None:
        self.source = source
        self.tensors = tensors
        self.layout: Layout | None = recognise(tensors)
        self.names: dict[str, str] = {}
        self.unknown: list[str] = []
        dropped = []
        for name in tensors:
            target = self.layout.canonical(name) if self.layout else None
            if isinstance(target, Dropped):
                dropped.append(DroppedTensor(Operand(source, name), target.reason))
            elif target is None:
                self.unknown.append(name)
            else:
                self.names[target] = name
        self.dropped = tuple(dropped)

    def check_kind(self, kind: Kind) -> None:
        wanted = "a DINOv3 backbone" if kind == "backbone" else "EoMT weights"
        if self.layout is None:
            first = ", ".join(list(self.tensors)[:3]) or "no tensor at all"
            raise PlanError(
                f"The {self.source} is of no layout that is known: it has {first}, ...",
                f"Expected {wanted}. eomt-convert inspect shows what is in a file.",
            )
        if self.layout.kind != kind or self.layout.name == "eomt-transformers":
            swapped = self.layout.kind != kind and self.layout.name != "eomt-transformers"
            raise PlanError(
                f"The {self.source} is {self.layout.title}, not {wanted}.",
                "Are --delta and --backbone swapped?"
                if swapped
                else "It is converted already: eomt-convert verify checks it.",
            )

    def info(self, name: str) -> TensorInfo | None:
        return self.tensors[self.names[name]] if name in self.names else None

    def left_over(self, needed: Mapping[str, tuple[int, ...]]) -> list[str]:
        extra = [name for canonical, name in self.names.items() if canonical not in needed]
        return [
            f"{name} {list(self.tensors[name].shape)} in the {self.source} is left over: the model "
            "has no place for it"
            for name in extra + self.unknown
        ]

    def describe(self) -> tuple[int, int, bool] | None:
        """(hidden size, layers, gated MLP), as far as the shapes tell."""
        norm = self.info("layernorm.weight")
        layers = {split_number(name)[1] for name in self.names if name.startswith("layers.")}
        gated = any(".gate_proj." in name for name in self.names)
        return (norm.size, len(layers), gated) if norm else None


def _row(name: str, shape: tuple[int, ...], sources: list[_Translated]) -> Row | list[str]:
    """The row of a tensor; a list of what is wrong if it cannot be made."""
    if name == "attn_mask_probs":
        return Row(name, shape, "F32", "zeros", ())
    if name == "criterion.empty_weight" and sources[0].info(name) is None:
        return Row(name, shape, "F32", "class weights", ())
    problems = []
    for source in sources:
        info = source.info(name)
        if info is None:
            problems.append(f"{name} {list(shape)} is missing from the {source.source}")
        elif info.shape != shape:
            problems.append(
                f"{source.names[name]} in the {source.source} has the shape {list(info.shape)}, "
                f"the model needs {list(shape)}"
            )
        elif not info.dtype.startswith(("F", "BF")):
            problems.append(f"{source.names[name]} in the {source.source} holds {info.dtype}")
    if problems:
        return problems
    operands = tuple(Operand(source.source, source.names[name]) for source in sources)
    return Row(name, shape, "F32", "add" if len(operands) == 2 else "copy", operands)


def _head_sizes(head: _Translated, cause: str) -> HeadSizes:
    queries = head.info("query.weight")
    classes = head.info("class_predictor.weight")
    # dropped, but its length is the number of blocks
    blocks = head.tensors.get("network.attn_mask_probs")
    if queries is None or classes is None or blocks is None:
        raise PlanError("network.attn_mask_probs is missing from the delta.", cause)
    if not queries.shape or not classes.shape or len(blocks.shape) != 1 or classes.shape[0] < 2:
        raise PlanError(
            f"The delta's heads have impossible shapes: network.q.weight {list(queries.shape)}, "
            f"network.class_head.weight {list(classes.shape)}, network.attn_mask_probs "
            f"{list(blocks.shape)}.",
            cause,
        )
    return HeadSizes(queries.shape[0], classes.shape[0] - 1, blocks.shape[0])


def _likeliest_cause(base: _Translated, head: _Translated, config: BackboneConfig) -> str:
    configured = (config.hidden_size, config.num_hidden_layers, config.use_gated_mlp)
    found, wanted = base.describe(), head.describe()
    if found and found != configured:
        return (
            f"The backbone's config.json describes {_model(configured)}, its weights are of "
            f"{_model(found)}: they do not belong together."
        )
    if found and wanted and found != wanted:
        return (
            f"The delta was made for another backbone: it is of {_model(wanted)}, the backbone "
            f"given is {_model(found)}."
        )
    return "A file may be incomplete, or saved by another version of the training code."


def _model(size: tuple[int, int, bool]) -> str:
    hidden, layers, gated = size
    name = _KNOWN_SIZES.get(size)
    gate = ", gated" if gated else ""
    return f"{name or 'a model'} ({hidden} wide, {layers} layers{gate})"


def _list_of(problems: list[str]) -> str:
    shown = [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        shown.append(f"  and {len(problems) - _SHOWN} more")
    return "The weights do not add up to a model:\n" + "\n".join(shown)
