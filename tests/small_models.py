"""Small models of random weights."""

from pathlib import Path
from typing import Any

import torch

from reference_model import (
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtImageProcessor,
)


def small_config(**changes: Any) -> EomtDinov3Config:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_blocks": 2,
        "num_queries": 6,
        "image_size": 64,
        "pos_embed_rescale": None,
        "initializer_range": 0.2,
    }
    return EomtDinov3Config(**(sizes | changes))


def small_model(seed: int = 0, **changes: Any) -> EomtDinov3ForUniversalSegmentation:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EomtDinov3ForUniversalSegmentation(small_config(**changes)).eval()


def save_ade20k_model(folder: Path, processor: EomtImageProcessor, **changes: Any) -> None:
    """Saves a model with ADE20K's 150 classes for pictures of 32 pixels."""
    torch.manual_seed(0)
    config = EomtDinov3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_blocks=1,
        num_queries=12,
        id2label={i: str(i) for i in range(150)},
        **changes,
    )
    EomtDinov3ForUniversalSegmentation(config).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
