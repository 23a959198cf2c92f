"""The layouts that weights come in: one table each, from its names to the canonical ones.

The canonical names are those of transformers' `EomtDinov3ForUniversalSegmentation`. In a table the
upstream name stands on the left; on the right stands the canonical name, or why a tensor is
dropped. ``{}`` is the number of a layer or block.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["backbone", "eomt"]


@dataclass(frozen=True)
class Dropped:
    """Why a tensor has no place in a converted model."""

    reason: str


@dataclass(frozen=True)
class Layout:
    """A layout of weights.

    Attributes:
        name: what ``inspect`` calls it.
        title: what a sentence calls it.
        kind: whether such a file is a backbone or a whole segmentation model.
        signature: names that are all in such a file, and not all in a file of another layout.
        table: upstream name -> canonical name, or why it is dropped.
    """

    name: str
    title: str
    kind: Kind
    signature: tuple[str, ...]
    table: Mapping[str, str | Dropped]

    def canonical(self, name: str) -> str | Dropped | None:
        """The canonical name of an upstream name, or why it is dropped; None if it is unknown."""
        if name in self.table:
            return self.table[name]
        pattern, number = split_number(name)
        target = self.table.get(pattern)
        return target.format(number) if isinstance(target, str) else target


def split_number(name: str) -> tuple[str, str]:
    """Takes the first number out of a name: ``layer.7.norm.bias`` -> ``layer.{}.norm.bias``, 7."""
    match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
    return (f"{match[1]}{{}}{match[3]}", match[2]) if match else (name, "")


# The names inside a layer are the same everywhere but in Meta's and timm's files: TU/e trains
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

DINOV3_TRANSFORMERS = Layout(
    name="dinov3-transformers",
    title="a DINOv3 backbone in transformers' layout",
    kind="backbone",
    signature=("embeddings.patch_embeddings.weight", "norm.weight"),
    table={
        "embeddings.cls_token": "embeddings.cls_token",
        "embeddings.mask_token": Dropped("only masked image modelling uses it"),
        "embeddings.register_tokens": "embeddings.register_tokens",
        "embeddings.patch_embeddings.weight": "embeddings.patch_embeddings.weight",
        "embeddings.patch_embeddings.bias": "embeddings.patch_embeddings.bias",
        **{f"layer.{{}}.{tensor}": f"layers.{{}}.{tensor}" for tensor in LAYER},
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    },
)

_PIXEL_STATISTICS = Dropped("preprocessor_config.json has mean and deviation")

EOMT_TUE = Layout(
    name="eomt-tue",
    title="EoMT weights in TU/e's layout",
    kind="eomt",
    signature=("network.q.weight", "network.class_head.weight"),
    table={
        "network.attn_mask_probs": Dropped(
            "masked attention fades out in training; the model gets zeros (off)"
        ),
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

# the shape of every tensor of the model, by its canonical name
MODEL: Mapping[str, tuple[str | int, ...]] = {
    "attn_mask_probs": ("blocks",),
    "class_predictor.bias": ("classes + 1",),
    "class_predictor.weight": ("classes + 1", "hidden"),
    "criterion.empty_weight": ("classes + 1",),
    "embeddings.cls_token": (1, 1, "hidden"),
    "embeddings.patch_embeddings.bias": ("hidden",),
    "embeddings.patch_embeddings.weight": ("hidden", "channels", "patch", "patch"),
    "embeddings.register_tokens": (1, "registers", "hidden"),
    "layernorm.bias": ("hidden",),
    "layernorm.weight": ("hidden",),
    "layers.{}.attention.k_proj.bias": ("hidden",),
    "layers.{}.attention.k_proj.weight": ("hidden", "hidden"),
    "layers.{}.attention.o_proj.bias": ("hidden",),
    "layers.{}.attention.o_proj.weight": ("hidden", "hidden"),
    "layers.{}.attention.q_proj.bias": ("hidden",),
    "layers.{}.attention.q_proj.weight": ("hidden", "hidden"),
    "layers.{}.attention.v_proj.bias": ("hidden",),
    "layers.{}.attention.v_proj.weight": ("hidden", "hidden"),
    "layers.{}.layer_scale1.lambda1": ("hidden",),
    "layers.{}.layer_scale2.lambda1": ("hidden",),
    "layers.{}.mlp.down_proj.bias": ("hidden",),
    "layers.{}.mlp.down_proj.weight": ("hidden", "mlp"),
    "layers.{}.mlp.gate_proj.bias": ("mlp",),
    "layers.{}.mlp.gate_proj.weight": ("mlp", "hidden"),
    "layers.{}.mlp.up_proj.bias": ("mlp",),
    "layers.{}.mlp.up_proj.weight": ("mlp", "hidden"),
    "layers.{}.norm1.bias": ("hidden",),
    "layers.{}.norm1.weight": ("hidden",),
    "layers.{}.norm2.bias": ("hidden",),
    "layers.{}.norm2.weight": ("hidden",),
    "mask_head.fc1.bias": ("hidden",),
    "mask_head.fc1.weight": ("hidden", "hidden"),
    "mask_head.fc2.bias": ("hidden",),
    "mask_head.fc2.weight": ("hidden", "hidden"),
    "mask_head.fc3.bias": ("hidden",),
    "mask_head.fc3.weight": ("hidden", "hidden"),
    "query.weight": ("queries", "hidden"),
    "upscale_block.block.{}.conv1.bias": ("hidden",),
    "upscale_block.block.{}.conv1.weight": ("hidden", "hidden", 2, 2),
    "upscale_block.block.{}.conv2.weight": ("hidden", 1, 3, 3),
    "upscale_block.block.{}.layernorm2d.bias": ("hidden",),
    "upscale_block.block.{}.layernorm2d.weight": ("hidden",),
}

EOMT_TRANSFORMERS = Layout(
    name="eomt-transformers",
    title="an EoMT model in transformers' layout",
    kind="eomt",
    signature=("embeddings.patch_embeddings.weight", "class_predictor.weight"),
    table={name: name for name in MODEL},
)

LAYOUTS = (DINOV3_TRANSFORMERS, EOMT_TUE, EOMT_TRANSFORMERS)


def recognise(names: Iterable[str]) -> Layout | None:
    """The layout that a file's tensor names are of; None if it is none that is known."""
    present = set(names)
    for layout in LAYOUTS:
        if present.issuperset(layout.signature):
            return layout
    return None
