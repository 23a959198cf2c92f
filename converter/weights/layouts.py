"""The layouts of weights: one table for each, from its names to the canonical ones.

The canonical names are those of transformers' `EomtDinov3ForUniversalSegmentation`. The left side
of a table has the upstream name. The right side has the canonical name, several names for a fused
tensor, or the reason why the tensor is dropped. ``{}`` is the number of a layer or block.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from converter.errors import PlanError
from converter.weights.headers import TensorInfo
from reference_model.config import EomtDinov3Config

Kind = Literal["backbone", "eomt"]


@dataclass(frozen=True)
class Dropped:
    """The reason why a converted model does not have a tensor."""

    reason: str


@dataclass(frozen=True)
class Fused:
    """Tensors that are stored as one, as equal parts of its first axis."""

    parts: tuple[str | Dropped, ...]


Target = str | Dropped | Fused


@dataclass(frozen=True)
class Layout:
    """A layout of weights.

    Attributes:
        name: its name in the output of ``inspect``.
        title: its name in a sentence.
        kind: whether such a file is a backbone or a whole segmentation model.
        signature: names that all occur in such a file; a file of another layout lacks some.
        table: upstream name -> canonical name, or why it is dropped.
        plain_mlp, gated_mlp: beginnings of the names that only models without, or only models with
            a gated MLP have; elsewhere these names mean the same.
    """

    name: str
    title: str
    kind: Kind
    signature: tuple[str, ...]
    table: Mapping[str, Target]
    plain_mlp: tuple[str, ...] = ()
    gated_mlp: tuple[str, ...] = ()

    def target(self, name: str) -> tuple[str | Dropped, ...]:
        """The canonical name of each part of a tensor, or why it is dropped; () if unknown."""
        pattern, number = (name, "") if name in self.table else split_number(name)
        target = self.table.get(pattern)
        if target is None:
            return ()
        return tuple(_numbered(part, number) for part in _parts(target))

    def stored(self, names: Iterable[str]) -> dict[str, tuple[str | Dropped, ...]]:
        """The reverse of `target`: the tensors in which a file of this layout stores others.

        Args:
            names: canonical names; those that the layout does not have are left out.

        Returns:
            The parts of every tensor of the file, by its name, in the order of the table. A dropped
            part is one that the file has and the model has not.
        """
        numbers: dict[str, list[str]] = {}
        for name in names:
            pattern, number = (name, "") if name in MODEL else split_number(name)
            numbers.setdefault(pattern, []).append(number)
        gated = "layers.{}.mlp.gate_proj.weight" in numbers
        others = self.plain_mlp if gated else self.gated_mlp
        found = {}
        for pattern, target in self.table.items():
            parts = _parts(target)
            kept = [part for part in parts if isinstance(part, str)]
            if not kept or pattern.startswith(others):
                continue
            for number in numbers.get(kept[0], ()):
                found[pattern.format(number)] = tuple(_numbered(part, number) for part in parts)
        return found


def _parts(target: Target) -> tuple[str | Dropped, ...]:
    return target.parts if isinstance(target, Fused) else (target,)


def _numbered(part: str | Dropped, number: str) -> str | Dropped:
    return part.format(number) if isinstance(part, str) else part


def split_number(name: str) -> tuple[str, str]:
    """Splits the first number from a name: ``layer.7.norm.bias`` -> ``layer.{}.norm.bias``, 7."""
    match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
    return (f"{match[1]}{{}}{match[3]}", match[2]) if match else (name, "")


# The names inside a layer are the same in all layouts but Meta's and timm's: TU/e trains
# transformers' backbone.
LAYER = (
    "norm1.weight",
    "norm1.bias",
    "attention.q_proj.weight",
    "attention.q_proj.bias",
    "attention.k_proj.weight",
    "attention.k_proj.bias",
    "attention.v_proj.weight",
    "attention.v_proj.bias",
    "attention.o_proj.weight",
    "attention.o_proj.bias",
    "layer_scale1.lambda1",
    "norm2.weight",
    "norm2.bias",
    "mlp.gate_proj.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.weight",
    "mlp.up_proj.bias",
    "mlp.down_proj.weight",
    "mlp.down_proj.bias",
    "layer_scale2.lambda1",
)

_MASK_TOKEN = Dropped("only masked image modelling uses it")
_LOCAL_NORM = Dropped("only training uses it, for local crops")
_MASK_SCHEDULE = Dropped("masked attention fades out in training; the model gets zeros (off)")
_PIXEL_STATISTICS = Dropped("preprocessor_config.json has the mean and standard deviation")

_QKV_WEIGHT = Fused(
    (
        "layers.{}.attention.q_proj.weight",
        "layers.{}.attention.k_proj.weight",
        "layers.{}.attention.v_proj.weight",
    )
)

DINOV3_TRANSFORMERS = Layout(
    name="dinov3-transformers",
    title="a DINOv3 backbone in transformers' layout",
    kind="backbone",
    signature=("embeddings.patch_embeddings.weight", "norm.weight"),
    table={
        "embeddings.cls_token": "embeddings.cls_token",
        "embeddings.mask_token": _MASK_TOKEN,
        "embeddings.register_tokens": "embeddings.register_tokens",
        "embeddings.patch_embeddings.weight": "embeddings.patch_embeddings.weight",
        "embeddings.patch_embeddings.bias": "embeddings.patch_embeddings.bias",
        **{f"layer.{{}}.{tensor}": f"layers.{{}}.{tensor}" for tensor in LAYER},
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    },
)

# github.com/facebookresearch/dinov3: dinov3/models/vision_transformer.py, dinov3/layers/
DINOV3_META = Layout(
    name="dinov3-meta",
    title="a DINOv3 backbone in Meta's layout",
    kind="backbone",
    signature=("storage_tokens", "patch_embed.proj.weight", "norm.weight"),
    table={
        "cls_token": "embeddings.cls_token",
        "mask_token": _MASK_TOKEN,
        "storage_tokens": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
        "rope_embed.periods": Dropped("the model computes them from rope_theta, in float32"),
        "blocks.{}.norm1.weight": "layers.{}.norm1.weight",
        "blocks.{}.norm1.bias": "layers.{}.norm1.bias",
        "blocks.{}.attn.qkv.weight": _QKV_WEIGHT,
        "blocks.{}.attn.qkv.bias": Fused(
            (
                "layers.{}.attention.q_proj.bias",
                Dropped("keys have no bias: bias_mask switches it off"),
                "layers.{}.attention.v_proj.bias",
            )
        ),
        "blocks.{}.attn.qkv.bias_mask": Dropped("the bias that it switches off is dropped"),
        "blocks.{}.attn.proj.weight": "layers.{}.attention.o_proj.weight",
        "blocks.{}.attn.proj.bias": "layers.{}.attention.o_proj.bias",
        "blocks.{}.ls1.gamma": "layers.{}.layer_scale1.lambda1",
        "blocks.{}.norm2.weight": "layers.{}.norm2.weight",
        "blocks.{}.norm2.bias": "layers.{}.norm2.bias",
        "blocks.{}.mlp.fc1.weight": "layers.{}.mlp.up_proj.weight",
        "blocks.{}.mlp.fc1.bias": "layers.{}.mlp.up_proj.bias",
        "blocks.{}.mlp.fc2.weight": "layers.{}.mlp.down_proj.weight",
        "blocks.{}.mlp.fc2.bias": "layers.{}.mlp.down_proj.bias",
        "blocks.{}.mlp.w1.weight": "layers.{}.mlp.gate_proj.weight",
        "blocks.{}.mlp.w1.bias": "layers.{}.mlp.gate_proj.bias",
        "blocks.{}.mlp.w2.weight": "layers.{}.mlp.up_proj.weight",
        "blocks.{}.mlp.w2.bias": "layers.{}.mlp.up_proj.bias",
        "blocks.{}.mlp.w3.weight": "layers.{}.mlp.down_proj.weight",
        "blocks.{}.mlp.w3.bias": "layers.{}.mlp.down_proj.bias",
        "blocks.{}.ls2.gamma": "layers.{}.layer_scale2.lambda1",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
        "local_cls_norm.weight": _LOCAL_NORM,
        "local_cls_norm.bias": _LOCAL_NORM,
    },
    plain_mlp=("blocks.{}.mlp.fc",),
    gated_mlp=("blocks.{}.mlp.w",),
)

# github.com/huggingface/pytorch-image-models: timm/models/eva.py
DINOV3_TIMM = Layout(
    name="dinov3-timm",
    title="a DINOv3 backbone in timm's layout",
    kind="backbone",
    signature=("reg_token", "patch_embed.proj.weight", "norm.weight"),
    table={
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
        "blocks.{}.norm1.weight": "layers.{}.norm1.weight",
        "blocks.{}.norm1.bias": "layers.{}.norm1.bias",
        "blocks.{}.attn.qkv.weight": _QKV_WEIGHT,
        "blocks.{}.attn.q_bias": "layers.{}.attention.q_proj.bias",
        "blocks.{}.attn.v_bias": "layers.{}.attention.v_proj.bias",
        "blocks.{}.attn.proj.weight": "layers.{}.attention.o_proj.weight",
        "blocks.{}.attn.proj.bias": "layers.{}.attention.o_proj.bias",
        "blocks.{}.gamma_1": "layers.{}.layer_scale1.lambda1",
        "blocks.{}.norm2.weight": "layers.{}.norm2.weight",
        "blocks.{}.norm2.bias": "layers.{}.norm2.bias",
        "blocks.{}.mlp.fc1.weight": "layers.{}.mlp.up_proj.weight",
        "blocks.{}.mlp.fc1.bias": "layers.{}.mlp.up_proj.bias",
        "blocks.{}.mlp.fc1_g.weight": "layers.{}.mlp.gate_proj.weight",
        "blocks.{}.mlp.fc1_g.bias": "layers.{}.mlp.gate_proj.bias",
        "blocks.{}.mlp.fc1_x.weight": "layers.{}.mlp.up_proj.weight",
        "blocks.{}.mlp.fc1_x.bias": "layers.{}.mlp.up_proj.bias",
        "blocks.{}.mlp.fc2.weight": "layers.{}.mlp.down_proj.weight",
        "blocks.{}.mlp.fc2.bias": "layers.{}.mlp.down_proj.bias",
        "blocks.{}.gamma_2": "layers.{}.layer_scale2.lambda1",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    },
    plain_mlp=("blocks.{}.mlp.fc1.",),
    gated_mlp=("blocks.{}.mlp.fc1_",),
)

EOMT_TUE = Layout(
    name="eomt-tue",
    title="EoMT weights in TU/e's layout",
    kind="eomt",
    signature=("network.q.weight", "network.class_head.weight"),
    table={
        "network.attn_mask_probs": _MASK_SCHEDULE,
        "network.encoder.pixel_mean": _PIXEL_STATISTICS,
        "network.encoder.pixel_std": _PIXEL_STATISTICS,
        "network.encoder.backbone.patch_embed.cls_token": "embeddings.cls_token",
        "network.encoder.backbone.patch_embed.register_tokens": "embeddings.register_tokens",
        "network.encoder.backbone.patch_embed.patch_embeddings.weight": (
            "embeddings.patch_embeddings.weight"
        ),
        "network.encoder.backbone.patch_embed.patch_embeddings.bias": (
            "embeddings.patch_embeddings.bias"
        ),
        **{
            f"network.encoder.backbone.blocks.{{}}.{tensor}": f"layers.{{}}.{tensor}"
            for tensor in LAYER
        },
        "network.encoder.backbone.norm.weight": "layernorm.weight",
        "network.encoder.backbone.norm.bias": "layernorm.bias",
        "network.q.weight": "query.weight",
        "network.class_head.weight": "class_predictor.weight",
        "network.class_head.bias": "class_predictor.bias",
        "network.mask_head.0.weight": "mask_head.fc1.weight",
        "network.mask_head.0.bias": "mask_head.fc1.bias",
        "network.mask_head.2.weight": "mask_head.fc2.weight",
        "network.mask_head.2.bias": "mask_head.fc2.bias",
        "network.mask_head.4.weight": "mask_head.fc3.weight",
        "network.mask_head.4.bias": "mask_head.fc3.bias",
        "network.upscale.{}.conv1.weight": "upscale_block.block.{}.conv1.weight",
        "network.upscale.{}.conv1.bias": "upscale_block.block.{}.conv1.bias",
        "network.upscale.{}.conv2.weight": "upscale_block.block.{}.conv2.weight",
        "network.upscale.{}.norm.weight": "upscale_block.block.{}.layernorm2d.weight",
        "network.upscale.{}.norm.bias": "upscale_block.block.{}.layernorm2d.bias",
        "criterion.empty_weight": "criterion.empty_weight",
    },
)


# github.com/lightly-ai/lightly-train: _task_models/dinov3_eomt_*/task_model.py and scale_block.py;
# the backbone is Meta's
EOMT_LIGHTLY = Layout(
    name="eomt-lightly",
    title="EoMT weights in LightlyTrain's layout",
    kind="eomt",
    signature=("queries.weight", "class_head.weight", "backbone.storage_tokens"),
    table={
        **{f"backbone.{name}": target for name, target in DINOV3_META.table.items()},
        "queries.weight": "query.weight",
        **{
            name.removeprefix("network."): target
            for name, target in EOMT_TUE.table.items()
            if name.startswith(("network.class_head.", "network.mask_head.", "network.upscale."))
        },
        "criterion.empty_weight": "criterion.empty_weight",
    },
)


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the model, described by the fields of its configuration.

    Attributes:
        shape: the length of each axis: a number, or the name of the field that holds it.
        only_if: fields; the model has the tensor only if they are all true.
    """

    shape: tuple[str | int, ...]
    only_if: tuple[str, ...] = ()


def _tensor(*shape: str | int, only_if: tuple[str, ...] = ()) -> ModelTensor:
    return ModelTensor(shape, only_if)


# every tensor of the model, by its canonical name
MODEL: Mapping[str, ModelTensor] = {
    "attn_mask_probs": _tensor("num_blocks"),
    "class_predictor.bias": _tensor("num_labels + 1"),
    "class_predictor.weight": _tensor("num_labels + 1", "hidden_size"),
    "criterion.empty_weight": _tensor("num_labels + 1"),
    "embeddings.cls_token": _tensor(1, 1, "hidden_size"),
    "embeddings.patch_embeddings.bias": _tensor("hidden_size"),
    "embeddings.patch_embeddings.weight": _tensor(
        "hidden_size", "num_channels", "patch_size", "patch_size"
    ),
    "embeddings.register_tokens": _tensor(1, "num_register_tokens", "hidden_size"),
    "layernorm.bias": _tensor("hidden_size"),
    "layernorm.weight": _tensor("hidden_size"),
    "layers.{}.attention.k_proj.bias": _tensor("hidden_size", only_if=("key_bias",)),
    "layers.{}.attention.k_proj.weight": _tensor("hidden_size", "hidden_size"),
    "layers.{}.attention.o_proj.bias": _tensor("hidden_size", only_if=("proj_bias",)),
    "layers.{}.attention.o_proj.weight": _tensor("hidden_size", "hidden_size"),
    "layers.{}.attention.q_proj.bias": _tensor("hidden_size", only_if=("query_bias",)),
    "layers.{}.attention.q_proj.weight": _tensor("hidden_size", "hidden_size"),
    "layers.{}.attention.v_proj.bias": _tensor("hidden_size", only_if=("value_bias",)),
    "layers.{}.attention.v_proj.weight": _tensor("hidden_size", "hidden_size"),
    "layers.{}.layer_scale1.lambda1": _tensor("hidden_size"),
    "layers.{}.layer_scale2.lambda1": _tensor("hidden_size"),
    "layers.{}.mlp.down_proj.bias": _tensor("hidden_size", only_if=("mlp_bias",)),
    "layers.{}.mlp.down_proj.weight": _tensor("hidden_size", "intermediate_size"),
    "layers.{}.mlp.gate_proj.bias": _tensor(
        "intermediate_size", only_if=("use_gated_mlp", "mlp_bias")
    ),
    "layers.{}.mlp.gate_proj.weight": _tensor(
        "intermediate_size", "hidden_size", only_if=("use_gated_mlp",)
    ),
    "layers.{}.mlp.up_proj.bias": _tensor("intermediate_size", only_if=("mlp_bias",)),
    "layers.{}.mlp.up_proj.weight": _tensor("intermediate_size", "hidden_size"),
    "layers.{}.norm1.bias": _tensor("hidden_size"),
    "layers.{}.norm1.weight": _tensor("hidden_size"),
    "layers.{}.norm2.bias": _tensor("hidden_size"),
    "layers.{}.norm2.weight": _tensor("hidden_size"),
    "mask_head.fc1.bias": _tensor("hidden_size"),
    "mask_head.fc1.weight": _tensor("hidden_size", "hidden_size"),
    "mask_head.fc2.bias": _tensor("hidden_size"),
    "mask_head.fc2.weight": _tensor("hidden_size", "hidden_size"),
    "mask_head.fc3.bias": _tensor("hidden_size"),
    "mask_head.fc3.weight": _tensor("hidden_size", "hidden_size"),
    "query.weight": _tensor("num_queries", "hidden_size"),
    "upscale_block.block.{}.conv1.bias": _tensor("hidden_size"),
    "upscale_block.block.{}.conv1.weight": _tensor("hidden_size", "hidden_size", 2, 2),
    "upscale_block.block.{}.conv2.weight": _tensor("hidden_size", 1, 3, 3),
    "upscale_block.block.{}.layernorm2d.bias": _tensor("hidden_size"),
    "upscale_block.block.{}.layernorm2d.weight": _tensor("hidden_size"),
}

# the field with the number of layers or blocks, by the beginning of a numbered name
_COUNTS = {"layers": "num_hidden_layers", "upscale_block": "num_upscale_blocks"}


def model_shapes(config: EomtDinov3Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, by canonical name."""
    sizes = {**vars(config), "num_labels + 1": config.num_labels + 1}
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, tensor in MODEL.items():
        if all(sizes[switch] for switch in tensor.only_if):
            shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
            count = sizes[_COUNTS[pattern.partition(".")[0]]] if "{}" in pattern else 1
            shapes |= {pattern.format(number): shape for number in range(count)}
    return shapes


EOMT_TRANSFORMERS = Layout(
    name="eomt-transformers",
    title="an EoMT model in transformers' layout",
    kind="eomt",
    signature=("embeddings.patch_embeddings.weight", "class_predictor.weight"),
    table={name: name for name in MODEL} | {"attn_mask_probs": _MASK_SCHEDULE},
)

LAYOUTS = (
    DINOV3_TRANSFORMERS,
    DINOV3_META,
    DINOV3_TIMM,
    EOMT_TUE,
    EOMT_LIGHTLY,
    EOMT_TRANSFORMERS,
)

BACKBONE_LAYOUTS = {
    layout.name.removeprefix("dinov3-"): layout for layout in LAYOUTS if layout.kind == "backbone"
}


def recognise(names: Iterable[str]) -> Layout | None:
    """The layout of a file with these tensor names; None if it is not a supported one."""
    present = {plain_name(name) for name in names}
    for layout in LAYOUTS:
        if present.issuperset(layout.signature):
            return layout
    return None


def plain_name(name: str) -> str:
    """A name without the prefix that torch.compile adds to the modules that it wraps."""
    return name.replace("_orig_mod.", "")


@dataclass(frozen=True)
class Part:
    """A tensor of a file, or one of the equal parts of a fused one.

    Attributes:
        name: its name in the file.
        index: number of the part, from 0.
        count: number of equal parts along the first axis; 1 for the whole tensor.
    """

    name: str
    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.name}[{self.index + 1}/{self.count}]"


@dataclass(frozen=True)
class Translation:
    """The tensors of a file by their canonical names.

    Attributes:
        layout: the file's layout.
        tensors: what its header says, by the names in the file.
        parts: where each canonical tensor is in the file.
        dropped: tensors that are left out, and why.
        unknown: names in the file that the layout does not have.
    """

    layout: Layout
    tensors: Mapping[str, TensorInfo]
    parts: Mapping[str, Part]
    dropped: tuple[tuple[Part, str], ...]
    unknown: tuple[str, ...]

    def shape(self, canonical: str) -> tuple[int, ...] | None:
        """The shape of a canonical tensor; None if the file does not have it."""
        part = self.parts.get(canonical)
        if part is None:
            return None
        shape = self.tensors[part.name].shape
        # A fused tensor whose first axis cannot be divided keeps its shape. It then differs from
        # the model's, which is reported.
        if part.count > 1 and shape and shape[0] % part.count == 0:
            return (shape[0] // part.count, *shape[1:])
        return shape


def translate(tensors: Mapping[str, TensorInfo], layout: Layout) -> Translation:
    """Finds the canonical tensors in a file.

    Raises:
        PlanError: two tensors of the file have the same canonical name.
    """
    parts: dict[str, Part] = {}
    dropped, unknown = [], []
    for name in tensors:
        targets = layout.target(plain_name(name))
        for index, target in enumerate(targets):
            part = Part(name, index, len(targets))
            if isinstance(target, Dropped):
                dropped.append((part, target.reason))
            elif target in parts:
                raise PlanError(
                    f"{parts[target]} and {part} are both {target}, expected one of them."
                )
            else:
                parts[target] = part
        if not targets:
            unknown.append(name)
    return Translation(layout, tensors, parts, tuple(dropped), tuple(unknown))
