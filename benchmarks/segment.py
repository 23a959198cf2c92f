"""Time and memory of `eomt-convert segment`, beside the code of an earlier commit.

    python benchmarks/segment.py --runs 5

Converts shapes_panoptic_128, enlarges its scenes to JPEGs of 1920x1080, and segments them in turns
with both, each run in a process of its own. What counts is the time from the first picture to the
last, without loading the model. The earlier commit wrote an overlay as PNG for every picture, so
both ratios are to that. Linux only, which keeps the peak of memory.
"""

import argparse
import inspect
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from convert import machine, spread
from postprocess import memory

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "fixtures" / "shapes_panoptic_128"

LARGE, SMALL = (1920, 1080), (480, 270)  # width, height
FEW, MANY = 10, 1000  # pictures of which memory is measured


class Run(NamedTuple):
    """Milliseconds of wall and CPU time per picture, and the process's peak memory in MB."""

    wall: float
    cpu: float
    memory: float


# in a process of its own -------------------------------------------------------------------------


def segment_once(model: str, pictures: str, output: str, overlay: str, workers: str) -> None:
    """Segments a folder and prints a Run as JSON."""
    from converter.pictures.segmenting import segment

    calls: list[tuple[float, float]] = []
    options: dict[str, Any] = {}
    if "overlay" in inspect.signature(segment).parameters:
        options = {"overlay": overlay, "workers": int(workers) if workers else None}
    found = segment(
        model,
        [pictures],
        output,
        progress=lambda *_: calls.append((time.perf_counter(), time.process_time())),
        **options,
    )
    wall, cpu = (
        1000 * (last - first) / len(found.pictures)
        for first, last in zip(calls[0], calls[-1], strict=True)
    )
    print(json.dumps(Run(wall, cpu, memory("VmHWM") / 1e6)))


# measuring ---------------------------------------------------------------------------------------


def measure(tree: Path, model: Path, pictures: Path, overlay: str, workers: str = "") -> Run:
    """Segments a folder with the code of a tree."""
    with tempfile.TemporaryDirectory(dir=pictures.parent) as output:
        result = subprocess.run(
            [sys.executable, __file__, "--once", model, pictures, output, overlay, workers],
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdout=subprocess.PIPE,
            check=True,
        )
    return Run(*json.loads(result.stdout))


def code_of(commit: str, folder: Path) -> Path:
    """The packages of a commit, unpacked."""
    packages = subprocess.run(
        ["git", "-C", ROOT, "archive", commit, "converter", "reference_model"],  # noqa: S607
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packages)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def make_pictures(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """JPEGs of the fixture's scenes, enlarged; where there are more pictures, scenes recur."""
    from PIL import Image

    folder.mkdir()
    scenes = sorted((FIXTURE / "val" / "images").iterdir())
    for index in range(count):
        picture = folder / f"{index:04}.jpg"
        if index < len(scenes):
            with Image.open(scenes[index]) as scene:
                enlarged = scene.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            enlarged.save(picture, quality=90)
        else:
            os.link(folder / f"{index % len(scenes):04}.jpg", picture)
    return folder


def conditions(runs: int, commit: str) -> str:
    """Versions and machine that the figures were measured with."""
    return (
        f"Median (min–max) of {runs} runs each, in turns; before: {commit}. "
        f"{machine('torch', 'pillow', 'numpy')}"
    )


def main() -> None:
    if sys.argv[1:2] == ["--once"]:
        segment_once(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description="Time and memory of eomt-convert segment.")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each, default 5")
    parser.add_argument("--pictures", type=int, default=24, help="for the times, default 24")
    parser.add_argument("--before", default="5249b97", help="the commit to compare with")
    arguments = parser.parse_args()

    from converter import convert

    with tempfile.TemporaryDirectory(prefix="eomt-convert-benchmark-") as temporary:
        folder = Path(temporary)
        model = folder / "model"
        convert(FIXTURE.name, output=model, verify=False)
        before = code_of(arguments.before, folder / "before")
        large = make_pictures(folder / "large", arguments.pictures, LARGE)
        ways = {
            "before": (before, "png"),
            "overlay jpg": (ROOT, "jpg"),
            "overlay none": (ROOT, "none"),
        }
        taken: dict[str, list[Run]] = {name: [] for name in ways}
        for run in range(arguments.runs):
            for name in ways if run % 2 == 0 else reversed(ways):
                tree, overlay = ways[name]
                taken[name].append(measure(tree, model, large, overlay))

        print("| per picture | wall time | CPU time | ratio of wall time |")
        print("|---|---|---|---|")
        for name, runs in taken.items():
            ratios = [
                run.wall / first.wall for run, first in zip(runs, taken["before"], strict=True)
            ]
            cells = (
                spread([run.wall for run in runs], 0, " ms"),
                spread([run.cpu for run in runs], 0, " ms"),
            )
            print(f"| {name} | {' | '.join(cells)} | {spread(ratios, 2)} |")

        print(f"\n| peak memory, {SMALL[0]}x{SMALL[1]} | before | now |\n|---|---|---|")
        for count in (FEW, MANY):
            small = make_pictures(folder / f"{count}", count, SMALL)
            peaks = [measure(before, model, small, "png"), measure(ROOT, model, small, "jpg")]
            megabytes = " | ".join(f"{peak.memory:.0f} MB" for peak in peaks)
            print(f"| {count} pictures | {megabytes} |")
    print(f"\n{conditions(arguments.runs, arguments.before)}")


if __name__ == "__main__":
    main()
