"""Time and memory of a verification by level, compared with reading the files and a forward pass.

    python benchmarks/verify.py --size large --runs 5

Converts a random checkpoint with the real shapes, records what it computes, and compares it with
that. Every line of the table is measured in separate processes, in turns. Imports do not count, nor
does loading the model before the bare forward pass. A level is measured with those before it.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from convert import SIZES, Size, apart, conditions, make_checkpoint, place, spread

Work = Callable[[], object]


@dataclass(frozen=True)
class Run:
    """What a piece of work needed.

    Attributes:
        wall, cpu: time in seconds.
        memory: peak of the process in bytes, including imports and loading.
        loads: how many times it read the model's weights.
        forwards: how many times it ran a whole network.
    """

    wall: float
    cpu: float
    memory: float
    loads: float
    forwards: int


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        title: its name in the table.
        prepare: returns the work for a folder; not measured.
        beside: title of the line that it is compared with, if any.
    """

    title: str
    prepare: Callable[[Path], Work]
    beside: str | None = None


# what is measured ------------------------------------------------------------------------------


def reading_the_model(folder: Path) -> Work:
    return lambda: digest(folder / "model" / "model.safetensors")


def reading_all(folder: Path) -> Work:
    checkpoint = folder / "checkpoint"
    return lambda: digest(
        folder / "model" / "model.safetensors",
        checkpoint / "model.safetensors",
        checkpoint / "pytorch_model.bin",
    )


def digest(*paths: Path) -> None:
    from converter.weights.tensorfiles import TensorFile

    for path in paths:
        with TensorFile(path) as file:
            file.sha256()


def forward(folder: Path) -> Work:
    from converter.checks.numbers import run
    from converter.checks.pixels import read_normalisation
    from converter.checks.recorded import read_recorded
    from reference_model import EomtDinov3ForUniversalSegmentation

    model = EomtDinov3ForUniversalSegmentation.from_pretrained(folder / "model").eval()
    normalisation = read_normalisation(folder / "model" / "preprocessor_config.json", 3)
    inputs = normalisation(read_recorded(folder / "recorded").pixels)
    return lambda: run(model, inputs)


def structure(folder: Path) -> Work:
    return verification(folder, level=1)


def arithmetic(folder: Path) -> Work:
    return verification(folder, level=2)


def arithmetic_with_sources(folder: Path) -> Work:
    checkpoint = folder / "checkpoint"
    return verification(
        folder, level=2, delta=str(checkpoint / "pytorch_model.bin"), backbone=str(checkpoint)
    )


def numbers(folder: Path) -> Work:
    return verification(folder, level=3)


def peers(folder: Path) -> Work:
    import transformers  # noqa: F401

    return verification(folder, level=4, against="transformers")


def verification(folder: Path, **options: Any) -> Work:
    import converter

    def work() -> None:
        verdict = converter.verify(folder / "model", recorded=folder / "recorded", **options)
        if verdict.verdict == "failed":
            raise SystemExit(verdict.reason)

    return work


READING, READING_ALL, FORWARD = (
    "reading and hashing the model",
    "reading and hashing model, delta and backbone",
    "a bare forward pass",
)
LINES = (
    Line(READING, reading_the_model),
    Line(READING_ALL, reading_all),
    Line(FORWARD, forward),
    Line("level 1, structure", structure, READING),
    Line("to level 2, arithmetic, against conversion.json", arithmetic, READING),
    Line("to level 2, arithmetic, against the sources", arithmetic_with_sources, READING_ALL),
    Line("to level 3, numbers", numbers, FORWARD),
    Line("to level 4, peers: transformers", peers, FORWARD),
)


# measuring -------------------------------------------------------------------------------------


def measure(line: Line, folder: Path, threads: int | None) -> Run:
    """Does the work of a line in a separate process, which returns what it needed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, line, folder, threads).result()


def measured(line: Line, folder: Path, threads: int | None) -> Run:
    import torch
    from torch.nn.modules.module import register_module_forward_hook

    import converter.checks.diagnosis.search
    import converter.checks.numbers  # noqa: F401, not a part of the work

    if threads:
        torch.set_num_threads(threads)
    work = line.prepare(folder)
    read, forwards, preadv = 0, 0, os.preadv
    weights = (folder / "model" / "model.safetensors").stat()

    def read_and_count(file: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = preadv(file, buffers, offset)
        if os.path.samestat(os.fstat(file), weights):
            read += count
        return count

    def count_forward(module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        nonlocal forwards
        forwards += type(module).__name__ == "EomtDinov3ForUniversalSegmentation"

    register_module_forward_hook(count_forward)
    with patch.object(os, "preadv", read_and_count):  # the package reads weights with it
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Run(wall, cpu, memory, read / weights.st_size, forwards)


def prepare(size: Size, folder: Path) -> None:
    """Makes a checkpoint, its model and a recording of the model, unless they exist."""
    if not (folder / "checkpoint").exists():
        make_checkpoint(size, folder / "checkpoint")
    from converter import convert
    from converter.checks.recording import record

    if not (folder / "model").exists():
        convert(
            None,
            folder / "model",
            delta=str(folder / "checkpoint" / "pytorch_model.bin"),
            backbone=str(folder / "checkpoint"),
            task="panoptic",
            image_size=640,
            verify=False,
        )
    if not (folder / "recorded").exists():
        record(folder / "model", folder / "recorded", random=1, layers=True)


# the table -------------------------------------------------------------------------------------


def table(taken: Mapping[str, list[Run]]) -> str:
    """The lines in Markdown."""
    rows = [
        "| | wall time | CPU time | peak memory | weights read | forwards | ratio of wall times |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in LINES:
        runs = taken[line.title]
        ratio = ""
        if line.beside:
            pairs = zip(runs, taken[line.beside], strict=True)
            ratios = [run.wall / other.wall for run, other in pairs]
            ratio = f"{spread(ratios, 2)} of {line.beside}"
        cells = (
            line.title,
            spread([run.wall for run in runs], 2, " s"),
            spread([run.cpu for run in runs], 2, " s"),
            spread([run.memory / 1e6 for run in runs], 0, " MB"),
            f"{max(run.loads for run in runs):.2f}",
            str(max(run.forwards for run in runs)),
            ratio,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a verification.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each, default 5")
    parser.add_argument("--threads", type=int, help="default: torch's, one per core")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoint, model and recording are kept"
    )
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    with place(arguments.folder) as parent:
        folder = parent / f"verify-{size.backbone}"
        folder.mkdir(exist_ok=True)
        apart(prepare, size, folder)
        taken: dict[str, list[Run]] = {line.title: [] for line in LINES}
        for run in range(arguments.runs):
            for line in LINES if run % 2 == 0 else reversed(LINES):
                taken[line.title].append(measure(line, folder, arguments.threads))
    print(f"{size.title} at 640x640, one picture of random pixels.\n")
    print(f"{table(taken)}\n\n{conditions(arguments.runs)}")


if __name__ == "__main__":
    main()
