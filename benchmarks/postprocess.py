"""Time and memory from the network's outputs to segments: ours compared with transformers'.

    python benchmarks/postprocess.py --pairs 5

Both get the same logits of 200 queries, some of which are kept, for a picture of 1080x1920, and
must give the same segments. They run in pairs in one process, alternating which one is first, after
one run each that is not counted. The memory that a run adds to a process that has loaded everything
is measured in separate processes. The ratio is ours / transformers': below 1, ours
is faster or smaller. Linux only, which keeps the peak.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import machine, spread

if TYPE_CHECKING:
    from reference_model import EomtDinov3ForUniversalSegmentationOutput

TARGET = (1080, 1920)  # height, width
QUERIES = 200
PROCESSORS = ("ours", "transformers")


@dataclass(frozen=True)
class Task:
    """Sizes of a task, as for a published model.

    Attributes:
        classes: number of classes in the dataset.
        side: side of the square input, in pixels.
        window_starts: where windows start on the resized picture; empty for one padded input.
    """

    classes: int
    side: int
    window_starts: tuple[int, ...] = ()


TASKS = {
    "panoptic": Task(classes=133, side=640),
    "instance": Task(classes=80, side=640),
    "semantic": Task(classes=150, side=512, window_starts=(0, 398)),
}


@dataclass(frozen=True)
class Measurement:
    """Seconds of every run, and bytes that a run adds at its peak, by processor."""

    seconds: dict[str, list[float]]
    peak: dict[str, int]


# what is measured ----------------------------------------------------------------------------


def make_outputs(task: Task, kept: int) -> "EomtDinov3ForUniversalSegmentationOutput":
    """Logits of `kept` queries with a high score for a class, and of others for "no object".

    The kept masks are side by side, the others anywhere.
    """
    import torch

    from reference_model import EomtDinov3ForUniversalSegmentationOutput

    random = torch.Generator().manual_seed(0)
    batch, grid = max(1, len(task.window_starts)), task.side // 4
    columns = round(kept**0.5)
    rows = -(-kept // columns)
    centres = torch.rand(QUERIES, 2, generator=random) * grid
    for query in range(kept):
        row, column = divmod(query, columns)
        # panoptic and instance inputs show the picture in their upper 9/16
        height = grid if task.window_starts else grid * TARGET[0] / TARGET[1]
        centres[query] = torch.tensor(
            [(row + 0.5) / rows * height, (column + 0.5) / columns * grid]
        )
    pixels = torch.stack(torch.meshgrid(*[torch.arange(grid) + 0.5] * 2, indexing="ij"))
    distances = (pixels - centres[:, :, None, None]).norm(dim=1)
    masks = (grid / columns / 3 - distances) + torch.randn(
        batch, QUERIES, grid, grid, generator=random
    )

    logits = torch.randn(batch, QUERIES, task.classes + 1, generator=random)
    labels = torch.randint(task.classes, (kept,), generator=random)
    logits[:, range(kept), labels] += 14
    logits[:, kept:, -1] += 14
    offsets = [torch.tensor([0, start, start + task.side]) for start in task.window_starts]
    return EomtDinov3ForUniversalSegmentationOutput(masks, logits, torch.empty(0), offsets)


def post_processor(name: str, who: str) -> Callable[[Any], Any]:
    """Turns outputs into the result for their picture."""
    task = TASKS[name]
    settings: dict[str, Any] = {
        "size": {
            "shortest_edge": task.side,
            "longest_edge": None if task.window_starts else task.side,
        },
        "do_split_image": bool(task.window_starts),
        "do_pad": not task.window_starts,
    }
    processor: Any
    if who == "ours":
        from reference_model import EomtImageProcessor

        processor = EomtImageProcessor(**settings)
    else:
        from transformers import EomtImageProcessorPil

        processor = EomtImageProcessorPil(**settings)
    function = getattr(processor, f"post_process_{name}_segmentation")
    return lambda outputs: function(outputs, target_sizes=[TARGET])[0]


# measuring -----------------------------------------------------------------------------------


def seconds_of_pairs(name: str, kept: int, pairs: int) -> dict[str, list[float]]:
    """Seconds of runs in pairs; the results must be equal."""
    outputs = make_outputs(TASKS[name], kept)
    functions = {who: post_processor(name, who) for who in PROCESSORS}
    check_equal(*(functions[who](outputs) for who in PROCESSORS))
    taken: dict[str, list[float]] = {who: [] for who in PROCESSORS}
    for pair in range(pairs):
        for who in PROCESSORS if pair % 2 == 0 else reversed(PROCESSORS):
            start = time.perf_counter()
            functions[who](outputs)
            taken[who].append(time.perf_counter() - start)
    return taken


def check_equal(ours: Any, theirs: Any) -> None:
    """Checks that two results have exactly the same segments."""
    import torch

    if isinstance(ours, dict):
        if ours["segments_info"] != theirs["segments_info"]:
            raise SystemExit("The two results have different segments.")
        ours, theirs = ours["segmentation"], theirs["segmentation"].long()
    if not torch.equal(ours, theirs):
        raise SystemExit(f"The two results differ in {int((ours != theirs).sum())} pixels.")


def added_memory(name: str, kept: int, who: str) -> int:
    """Bytes that one run adds to the resident memory of this process at its peak."""
    outputs = make_outputs(TASKS[name], kept)
    function = post_processor(name, who)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on: man 5 proc
    function(outputs)
    return memory("VmHWM") - before


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls a function in a separate process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# the table -----------------------------------------------------------------------------------


def table(measured: dict[tuple[str, int], Measurement]) -> Iterator[str]:
    """The measurements by task and number of kept queries, in Markdown."""
    yield "| | kept | | ours | transformers | ratio |"
    yield "|---|---|---|---|---|---|"
    for (name, kept), measurement in measured.items():
        ours, theirs = (measurement.seconds[who] for who in PROCESSORS)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        cells = (spread(ours, 2, " s"), spread(theirs, 2, " s"), spread(ratios, 2))
        yield f"| {name} | {kept} | wall time | {' | '.join(cells)} |"
        our_peak, their_peak = (measurement.peak[who] / 1e6 for who in PROCESSORS)
        yield (
            f"| {name} | {kept} | memory | {our_peak:.0f} MB | {their_peak:.0f} MB | "
            f"{our_peak / their_peak:.2f} |"
        )


def conditions(pairs: int, threads: int) -> str:
    """Versions and machine that the figures were measured with."""
    return (
        f"Median (min–max) of {pairs} pairs of runs; memory is what a run adds at its peak. "
        f"Picture {TARGET[0]}x{TARGET[1]}, {QUERIES} queries, float32, {threads} threads. "
        f"{machine('eomt-convert', 'transformers', 'torch')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory from outputs to segments.")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--kept", type=int, action="append", help="default: 20, 100 and 200")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of runs, default 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one per core")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for the processes that measure
    measured = {
        (name, kept): Measurement(
            seconds=apart(seconds_of_pairs, name, kept, arguments.pairs),
            peak={who: apart(added_memory, name, kept, who) for who in PROCESSORS},
        )
        for name, kept in product(arguments.task or TASKS, arguments.kept or (20, 100, 200))
    }
    print("\n".join(table(measured)), conditions(arguments.pairs, arguments.threads), sep="\n\n")


if __name__ == "__main__":
    main()
