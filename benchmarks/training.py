"""Time and memory of a training step: the reference model compared with transformers'.

    python benchmarks/training.py --size small --pairs 6

Both have the same weights, labels and random numbers. A step is forward pass, loss, backward pass
and AdamW. Steps run in one process, in turns, so that other load on the machine affects both; a
ratio is ours / transformers' within a pair. Peak memory is that of two steps in a process for each
model, without what it takes to import both; on a GPU, what torch has allocated.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from convert import conditions, spread
from forward import SIZES, Seconds, config_of, transformers_twin
from torch import Tensor

from reference_model import EomtDinov3ForUniversalSegmentation

MODELS = ("ours", "transformers")

# how far the losses of both models may be apart, relative to them: some of the points that they
# take, those where a mask is the least decided, depend on the last bits of the logits
TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2}


class Settings(NamedTuple):
    """What is trained.

    Attributes:
        image_size: height and width in pixels.
        batch: pictures.
        segments: in every picture.
        threads: of torch; None for its default.
    """

    size: str
    image_size: int
    batch: int
    segments: int
    device: str
    threads: int | None


def prepare(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)


def model_of(name: str, settings: Settings) -> Any:
    """A model of random weights in training, its queries masked with probability 0.5."""
    torch.manual_seed(0)
    model: Any = EomtDinov3ForUniversalSegmentation(config_of(settings.size, settings.image_size))
    model.attn_mask_probs.fill_(0.5)
    if name == "transformers":
        model = transformers_twin(model)
    return model.to(settings.device).train()


def inputs_of(settings: Settings) -> dict[str, Any]:
    """Noise, and rectangles as segments."""
    random = torch.Generator().manual_seed(0)
    side, count = settings.image_size, settings.segments

    def masks() -> Tensor:
        masks = torch.zeros(count, side, side)
        for mask in masks:
            top, left = torch.randint(side // 2, (2,), generator=random).tolist()
            height, width = torch.randint(side // 8, side // 2, (2,), generator=random).tolist()
            mask[top : top + height, left : left + width] = 1
        return masks.to(settings.device)

    pixel_values = torch.randn(settings.batch, 3, side, side, generator=random)
    return {
        "pixel_values": pixel_values.to(settings.device),
        "mask_labels": [masks() for _ in range(settings.batch)],
        "class_labels": [
            torch.randint(133, (count,), generator=random).to(settings.device)
            for _ in range(settings.batch)
        ],
    }


def step_of(model: Any, settings: Settings, dtype: str) -> Callable[[], float]:
    """A training step of a model, which returns the loss."""
    inputs = inputs_of(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> float:
        torch.manual_seed(0)
        with torch.autocast(settings.device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())  # waits for a GPU

    return step


# time ----------------------------------------------------------------------------------------


def measure(step: Callable[[], float]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def times(settings: Settings, dtype: str, pairs: int) -> dict[str, list[Seconds]]:
    """Takes turns, after a step of each that is not counted.

    Raises:
        AssertionError: the losses of the first steps differ.
    """
    prepare(settings)
    steps = {name: step_of(model_of(name, settings), settings, dtype) for name in MODELS}
    losses = [torch.tensor(step()) for step in steps.values()]
    torch.testing.assert_close(*losses, rtol=TOLERANCES[dtype], atol=0)
    taken: dict[str, list[Seconds]] = {name: [] for name in MODELS}
    for pair in range(pairs):
        for name in MODELS if pair % 2 == 0 else reversed(MODELS):
            taken[name].append(measure(steps[name]))
    return taken


# memory --------------------------------------------------------------------------------------


def memory(name: str, settings: Settings, dtype: str) -> float:
    """Peak in bytes, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured_memory, name, settings, dtype).result()


def measured_memory(name: str, settings: Settings, dtype: str) -> float:
    prepare(settings)
    imported = resident()
    step = step_of(model_of(name, settings), settings, dtype)
    for _ in range(2):  # the first makes the state of the optimizer
        step()
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident() - imported


def resident() -> float:
    """The most memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# the table -----------------------------------------------------------------------------------


def rows(dtype: str, taken: dict[str, list[Seconds]], peaks: dict[str, float]) -> list[str]:
    lines = []
    for what in Seconds._fields:
        ours, theirs = ([getattr(run, what) for run in taken[name]] for name in MODELS)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        cells = spread(ours, 2, " s"), spread(theirs, 2, " s"), spread(ratios, 2)
        title = {"wall": "wall time", "cpu": "CPU time"}[what]
        lines.append(f"| {dtype} | {title} | {' | '.join(cells)} |")
    a, b = (peaks[name] for name in MODELS)
    lines.append(f"| {dtype} | peak memory | {a / 1e6:.0f} MB | {b / 1e6:.0f} MB | {a / b:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step, beside transformers'.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--image-size", type=int, default=160, help="pixels, default 160")
    parser.add_argument("--batch", type=int, default=2, help="pictures, default 2")
    parser.add_argument("--segments", type=int, default=10, help="in a picture, default 10")
    parser.add_argument("--pairs", type=int, default=6, help="timed pairs of steps, default 6")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's, one per core")
    arguments = vars(parser.parse_args())
    pairs = arguments.pop("pairs")
    settings = Settings(**arguments)

    print("| | a step | ours | transformers | ratio |\n|---|---|---|---|---|")
    # first, while this process is small: on Linux, processes inherit the peak of what starts them
    peaks = {}
    for dtype in TOLERANCES:
        peaks[dtype] = {name: memory(name, settings, dtype) for name in MODELS}
    for dtype in TOLERANCES:
        print("\n".join(rows(dtype, times(settings, dtype, pairs), peaks[dtype])), flush=True)
    print(f"\n{conditions(pairs)}")


if __name__ == "__main__":
    main()
