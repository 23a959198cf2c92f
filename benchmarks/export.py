"""Time of a forward pass, run in five ways; time, memory and files of an export.

    python benchmarks/export.py --runs 10

The forward passes of a random ViT-S run in one process, in turns, so that other load on the machine
affects all of them; a ratio is that of a way to the reference model's eager pass in the same round.
Exports run in separate processes, which check what they have written.
"""

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from convert import apart, conditions, place, spread

from converter.history import Format

# pixels of height and width
IMAGE_SIZE = 640


@dataclass(frozen=True)
class Exported:
    """What an export needed, and what it wrote.

    Attributes:
        seconds: wall time.
        memory: peak of its process in bytes, including imports.
        files: sizes in bytes, by name.
        verdict: on the export.
    """

    seconds: float
    memory: float
    files: dict[str, int]
    verdict: str


def save_model(size: str, folder: Path) -> None:
    """Saves a random model of a published size, with its processor."""
    import torch
    from forward import config_of

    from reference_model import EomtDinov3ForUniversalSegmentation, EomtImageProcessor

    torch.manual_seed(0)
    model = EomtDinov3ForUniversalSegmentation(config_of(size, IMAGE_SIZE)).eval()
    model.attn_mask_probs.zero_()  # as in a converted model
    model.save_pretrained(folder)
    EomtImageProcessor(
        size={"shortest_edge": IMAGE_SIZE, "longest_edge": IMAGE_SIZE}
    ).save_pretrained(folder)


def export_model(folder: Path, output: Path, format: Format, result: Path) -> None:
    """Exports a model, and writes what that needed."""
    import json

    import converter

    start = time.perf_counter()
    done = converter.export(folder, output, format=format, force=True)
    seconds = time.perf_counter() - start
    files = {name: file.size for name, file in done.files.items()}
    # ru_maxrss is in KiB on Linux
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.write_text(json.dumps([seconds, memory, files, done.verdict.verdict]))


def exported(folder: Path, output: Path, format: Format) -> Exported:
    import json

    result = output.with_suffix(".json")
    apart(export_model, folder, output, format, result)
    return Exported(*json.loads(result.read_text()))


def ways(folder: Path, exports: Path) -> "dict[str, Callable[[], object]]":
    """The forward passes, by their names in the table."""
    import torch
    from forward import transformers_twin

    from converter.models import load_model
    from reference_model import EomtDinov3ForUniversalSegmentation

    model = EomtDinov3ForUniversalSegmentation.from_pretrained(folder)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True)
    by_torch, _ = load_model(exports / "torch", device="cpu", windows=False)
    by_onnxruntime, _ = load_model(exports / "onnx", device="cpu", windows=False)
    theirs = transformers_twin(model)
    return {
        "eager": lambda: model(pixels),
        "torch.compile": lambda: compiled(pixels),
        "torch.export": lambda: by_torch(pixels),
        "onnxruntime": lambda: by_onnxruntime(pixels),
        "transformers, eager": lambda: theirs(pixels),
    }


def time_forwards(folder: Path, exports: Path, runs: int) -> None:
    """Prints the table of forward passes."""
    import torch

    with torch.inference_mode():
        passes = ways(folder, exports)
        for run in passes.values():  # compiles and warms up
            run()
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for turn in range(runs):
            for name in list(passes)[:: 1 if turn % 2 == 0 else -1]:
                start = time.perf_counter()
                passes[name]()
                seconds[name].append(time.perf_counter() - start)
    print("| forward pass | wall time | ratio to eager |\n|---|---|---|")
    for name, times in seconds.items():
        ratios = [own / eager for own, eager in zip(times, seconds["eager"], strict=True)]
        milliseconds = [1000 * each for each in times]
        print(f"| {name} | {spread(milliseconds, 0, ' ms')} | {spread(ratios, 2)} |")
    print(f"\nViT-S at {IMAGE_SIZE}x{IMAGE_SIZE}, one picture.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of exported models, and of their export.")
    parser.add_argument("--sizes", nargs="+", default=["small", "large"], help="of the exports")
    parser.add_argument("--runs", type=int, default=10, help="timed rounds, default 10")
    parser.add_argument("--folder", type=Path, help="where models and exports are kept")
    arguments = parser.parse_args()

    with place(arguments.folder) as folder:
        print("| export | wall time | peak memory | files | verdict |\n|---|---|---|---|---|")
        for size in arguments.sizes:
            model = folder / size / "model"
            apart(save_model, size, model)
            for format in get_args(Format):
                done = exported(model, folder / size / format, format)
                files = ", ".join(
                    f"{name} {count / 1e6:.1f} MB"
                    for name, count in done.files.items()
                    if name.startswith("model.")
                )
                print(
                    f"| {size}, {format} | {done.seconds:.0f} s | {done.memory / 1e9:.2f} GB "
                    f"| {files} | {done.verdict} |"
                )
        print()
        apart(time_forwards, folder / "small" / "model", folder / "small", arguments.runs)
    print(f"\n{conditions(arguments.runs)}")


if __name__ == "__main__":
    main()
