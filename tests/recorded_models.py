"""The recorded models of fixtures/, their weights merged here and not by the converter."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from reference_model import (
    Dinov3Backbone,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
)

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = (
    "shapes_panoptic_128",
    "tiny_instance_64_gated",
    "tiny_panoptic_48x80",
    "tiny_panoptic_64",
    "tiny_semantic_48",
)
HEAD_NAMES = {
    "network.q.weight": "query.weight",
    "network.class_head.": "class_predictor.",
    "network.mask_head.0.": "mask_head.fc1.",
    "network.mask_head.2.": "mask_head.fc2.",
    "network.mask_head.4.": "mask_head.fc3.",
    "network.upscale.": "upscale_block.block.",
    "criterion.empty_weight": "criterion.empty_weight",
}
BACKBONE_NAMES = {"patch_embed.": "embeddings.", "blocks.": "layers.", "norm.": "layernorm."}


def read_json(name: str, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FIXTURES / name / file).read_text())
    return content


def recordings(name: str) -> dict[str, Tensor]:
    """The outputs of the original implementation."""
    return load_file(FIXTURES / name / "recorded.safetensors")


def pixel_values(name: str) -> Tensor:
    """The recorded input as the original normalises it, (batch, 3, height, width) float32.

    In the memory format of decoded pictures, which decides how the patch convolution rounds:
    with it, patch embeddings are equal to the recorded ones to the last bit.
    """
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = recordings(name)["pixels"].contiguous(memory_format=torch.channels_last)
    return (pixels / 255 - mean) / std


def config_values(name: str) -> dict[str, Any]:
    """config.json of the converted model."""
    backbone, recorded = read_json(name, "backbone/config.json"), read_json(name, "recorded.json")
    del backbone["model_type"], backbone["architectures"]
    names = recorded.get("classes", [f"class {i}" for i in range(recorded["num_classes"])])
    return backbone | {
        "image_size": recorded["image_size"],
        "num_queries": recorded["num_queries"],
        "num_blocks": recorded["num_blocks"],
        "id2label": {str(index): label for index, label in enumerate(names)},
        "stuff_classes": recorded["stuff_classes"],
    }


def backbone_state_dict(name: str) -> dict[str, Tensor]:
    """The bare backbone in canonical names."""
    stored = load_file(FIXTURES / name / "backbone" / "model.safetensors")
    del stored["embeddings.mask_token"]
    return {
        re.sub(r"^norm\.", "layernorm.", re.sub(r"^layer\.", "layers.", key)): tensor
        for key, tensor in stored.items()
    }


def converted_state_dict(name: str) -> dict[str, Tensor]:
    """Backbone plus delta in canonical names, float32."""
    path = FIXTURES / name / "delta" / "pytorch_model.bin"
    delta = torch.load(path, weights_only=True, map_location="cpu")
    state = backbone_state_dict(name)
    for key, tensor in delta.get("state_dict", delta).items():
        if key == "network.attn_mask_probs":
            state["attn_mask_probs"] = torch.zeros_like(tensor)
        elif key.startswith("network.encoder.backbone."):
            own = _renamed(key.removeprefix("network.encoder.backbone."), BACKBONE_NAMES)
            state[own] = state[own] + tensor
        elif not key.startswith("network.encoder.pixel_"):
            own = _renamed(key, HEAD_NAMES)
            state[re.sub(r"(block\.\d+)\.norm\.", r"\1.layernorm2d.", own)] = tensor
    return state


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def recorded_model(name: str) -> EomtDinov3ForUniversalSegmentation:
    model = EomtDinov3ForUniversalSegmentation(EomtDinov3Config.from_dict(config_values(name)))
    model.load_state_dict(converted_state_dict(name))
    return model.eval()


def recorded_backbone(name: str) -> Dinov3Backbone:
    backbone = Dinov3Backbone(EomtDinov3Config.from_dict(config_values(name)))
    backbone.load_state_dict(backbone_state_dict(name))
    return backbone.eval()
