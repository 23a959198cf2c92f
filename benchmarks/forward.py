"""Time of a whole forward pass: the reference model compared with transformers', in one process.

    python benchmarks/forward.py --size small --pairs 30

Both have the same random weights. They run in pairs, alternating which one is first, so that other
load on the machine affects both; a ratio is ours / transformers' within a pair, below 1 if ours is
faster. CPU time, of all threads together, depends less on other programs.
"""

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import EomtDinov3Config as TransformersConfig
from transformers import EomtDinov3ForUniversalSegmentation as TransformersModel

from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

# hidden size, layers, heads, blocks that see the queries: the published COCO panoptic models
SIZES = {"small": (384, 12, 6, 3), "base": (768, 12, 12, 3), "large": (1024, 24, 16, 4)}


class Seconds(NamedTuple):
    wall: float
    cpu: float


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
    theirs: Any = TransformersModel(TransformersConfig.from_dict(ours.config.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


def measure(model: nn.Module, pixel_values: Tensor) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    model(pixel_values)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def measure_pairs(
    ours: nn.Module, theirs: nn.Module, pixel_values: Tensor, pairs: int
) -> list[tuple[Seconds, Seconds]]:
    measured = []
    for pair in range(pairs):
        if pair % 2 == 0:
            first = measure(ours, pixel_values)
            measured.append((first, measure(theirs, pixel_values)))
        else:
            first = measure(theirs, pixel_values)
            measured.append((measure(ours, pixel_values), first))
    return measured


def table_of(measured: list[tuple[Seconds, Seconds]], title: str) -> Table:
    table = Table("", "min", "1st quartile", "median", "3rd quartile", title=title)
    for clock in Seconds._fields:
        ours = [getattr(run, clock) for run, _ in measured]
        theirs = [getattr(run, clock) for _, run in measured]
        for name, values in (("ours", ours), ("transformers", theirs)):
            figures = (min(values), *statistics.quantiles(values))
            table.add_row(f"{clock}, {name}", *(f"{1000 * figure:.0f} ms" for figure in figures))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        figures = (min(ours) / min(theirs), *statistics.quantiles(ratios))
        table.add_row(f"{clock}, ratio", *(f"{figure:.3f}" for figure in figures))
        table.add_section()
    return table


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a forward pass, beside transformers'.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--image-size", type=int, default=640, help="pixels, default 640")
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs of runs, default 30")
    parser.add_argument("--threads", type=int, help="default: torch's, one per core")
    arguments = parser.parse_args()

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = config_of(arguments.size, arguments.image_size)
    ours = EomtDinov3ForUniversalSegmentation(config).eval()
    ours.attn_mask_probs.zero_()  # as in a converted model
    theirs = transformers_twin(ours)
    pixel_values = torch.randn(1, 3, arguments.image_size, arguments.image_size)

    output, expected = ours(pixel_values), theirs(pixel_values)  # also a warm-up
    for name in ("masks_queries_logits", "class_queries_logits"):
        torch.testing.assert_close(
            getattr(output, name), getattr(expected, name), rtol=1e-4, atol=1e-4
        )

    side = arguments.image_size
    title = (
        f"{arguments.size}, {side}x{side}, batch 1, float32, CPU, "
        f"{torch.get_num_threads()} threads, {arguments.pairs} pairs"
    )
    measured = measure_pairs(ours, theirs, pixel_values, arguments.pairs)
    Console().print(table_of(measured, title))


if __name__ == "__main__":
    main()
