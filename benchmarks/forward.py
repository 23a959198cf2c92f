"""Time of a whole forward pass: the reference model beside transformers' model, in one process.

    python benchmarks/forward.py --size small --runs 15

Both hold the same random weights and take turns, so that both meet the same weather on the
machine. The ratio is ours / transformers', per pair of runs: below 1, ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import EomtDinov3Config as TransformersConfig
from transformers import EomtDinov3ForUniversalSegmentation as TransformersModel
from transformers.models.eomt_dinov3 import modeling_eomt_dinov3

from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

# hidden size, layers, heads, blocks that see the queries: the published COCO panoptic models
SIZES = {"small": (384, 12, 6, 3), "base": (768, 12, 12, 3), "large": (1024, 24, 16, 4)}


def config_of(size: str, image_size: int) -> EomtDinov3Config:
    hidden_size, layers, heads, blocks = SIZES[size]
    return EomtDinov3Config(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        num_blocks=blocks,
        image_size=image_size,
        layer_norm_eps=1e-5,
        id2label={index: str(index) for index in range(133)},
    )


def transformers_twin(ours: EomtDinov3ForUniversalSegmentation) -> Any:
    # its loss asks for SciPy, which a forward pass doesn't need
    with mock.patch.object(modeling_eomt_dinov3, "requires_backends"):
        theirs: Any = TransformersModel(TransformersConfig.from_dict(ours.config.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


def seconds(forward: Callable[[Tensor], object], pixel_values: Tensor) -> float:
    start = time.perf_counter()
    forward(pixel_values)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a forward pass, beside transformers'.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--image-size", type=int, default=640, help="pixels, default 640")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each, default 15")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = config_of(arguments.size, arguments.image_size)
    ours = EomtDinov3ForUniversalSegmentation(config).eval()
    ours.attn_mask_probs.zero_()  # as in a converted model
    theirs = transformers_twin(ours)
    pixel_values = torch.randn(1, 3, arguments.image_size, arguments.image_size)

    output, expected = ours(pixel_values), theirs(pixel_values)  # warms both up
    for name in ("masks_queries_logits", "class_queries_logits"):
        torch.testing.assert_close(
            getattr(output, name), getattr(expected, name), rtol=1e-4, atol=1e-4
        )

    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    for run in range(arguments.runs):
        turns = [("ours", ours), ("transformers", theirs)]
        for name, model in turns if run % 2 == 0 else reversed(turns):
            times[name].append(seconds(model, pixel_values))
    ratios = [a / b for a, b in zip(times["ours"], times["transformers"], strict=True)]

    side = arguments.image_size
    table = Table(
        "",
        "min",
        "median",
        "max",
        title=f"{arguments.size}, {side}x{side}, batch 1, float32, CPU, "
        f"{torch.get_num_threads()} threads, {arguments.runs} runs each",
    )
    for name, unit, values in (
        ("ours", " ms", [1000 * value for value in times["ours"]]),
        ("transformers", " ms", [1000 * value for value in times["transformers"]]),
        ("ratio", "", ratios),
    ):
        digits = 0 if unit else 3
        figures = (min(values), statistics.median(values), max(values))
        table.add_row(name, *(f"{figure:.{digits}f}{unit}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
