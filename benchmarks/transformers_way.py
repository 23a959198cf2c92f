"""A conversion written with transformers, which benchmarks/convert.py compares with.

    python benchmarks/transformers_way.py BACKBONE_FOLDER DELTA_FILE OUTPUT_FOLDER

The files are loaded and the model is built as in transformers' conversion script
(models/eomt_dinov3/convert_eomt_dinov3_to_hf.py, in its pull request): without initial weights, the
merged ones assigned. Digests are not computed.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

# the keys that a model's configuration copies from the backbone's
SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "layerscale_value",
    "num_channels",
    "num_register_tokens",
    "patch_size",
    "key_bias",
    "mlp_bias",
    "proj_bias",
    "query_bias",
    "use_gated_mlp",
    "value_bias",
)

# from names in the delta to names in the backbone, and to names in the model
TO_BACKBONE = (
    (r"^network\.encoder\.backbone\.patch_embed\.", "embeddings."),
    (r"^network\.encoder\.backbone\.blocks\.", "layer."),
    (r"^network\.encoder\.backbone\.norm\.", "norm."),
)
TO_MODEL = (
    (r"^network\.encoder\.backbone\.patch_embed\.", "embeddings."),
    (r"^network\.encoder\.backbone\.blocks\.", "layers."),
    (r"^network\.encoder\.backbone\.norm\.", "layernorm."),
    (r"^network\.q\.", "query."),
    (r"^network\.class_head\.", "class_predictor."),
    (r"^network\.mask_head\.0\.", "mask_head.fc1."),
    (r"^network\.mask_head\.2\.", "mask_head.fc2."),
    (r"^network\.mask_head\.4\.", "mask_head.fc3."),
    (r"^network\.upscale\.(\d+)\.norm\.", r"upscale_block.block.\1.layernorm2d."),
    (r"^network\.upscale\.", "upscale_block.block."),
    (r"^network\.attn_mask_probs$", "attn_mask_probs"),
)


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def merged(backbone: dict[str, Tensor], delta: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in delta.items():
        if name.startswith("network.encoder.pixel_"):
            continue
        if name.startswith("network.encoder.backbone."):
            tensor = backbone[renamed(name, TO_BACKBONE)] + tensor
        state[renamed(name, TO_MODEL)] = tensor
    state["attn_mask_probs"] = torch.zeros_like(state["attn_mask_probs"])
    return state


def model_config(backbone: dict[str, Any], state: dict[str, Tensor]) -> EomtDinov3Config:
    classes = len(state["class_predictor.weight"]) - 1
    return EomtDinov3Config(
        **{name: backbone[name] for name in SHARED},
        rope_parameters={"rope_type": "default", "rope_theta": backbone["rope_theta"]},
        image_size=640,
        num_queries=len(state["query.weight"]),
        num_blocks=len(state["attn_mask_probs"]),
        id2label={number: f"LABEL_{number}" for number in range(classes)},
    )


def main(backbone: Path, delta: Path, output: Path) -> None:
    config = json.loads((backbone / "config.json").read_text())
    state = merged(
        load_file(backbone / "model.safetensors"),
        torch.load(delta, map_location="cpu", weights_only=True),
    )
    with torch.device("meta"):
        model = EomtDinov3ForUniversalSegmentation(model_config(config, state))
    model.load_state_dict(state, assign=True)
    model.save_pretrained(output)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
