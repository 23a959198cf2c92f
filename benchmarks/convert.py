"""Time and memory of a whole conversion: eomt-convert compared with transformers' way.

    python benchmarks/convert.py --size large --runs 5

Makes a random checkpoint of the true shapes, converts it in turns, and prints a table in Markdown.
eomt-convert computes the digests of inputs, output and tensors, and by default reads the output
again to check it: its structure and every digest, as nothing is recorded of random weights.
transformers' way (benchmarks/transformers_way.py) computes no digest. The ratio is that of
eomt-convert --no-verify / transformers', per pair of runs: below 1, ours is faster or smaller.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

HERE = Path(__file__).parent
Shapes = Mapping[str, list[int]]


@dataclass(frozen=True)
class Size:
    """Which backbone and which published recipe's heads a checkpoint has.

    Attributes:
        title: its name in the table.
        backbone: name in fixtures/layouts.json.
        recipe: name of a published checkpoint in it; its heads are made as wide as the backbone.
    """

    title: str
    backbone: str
    recipe: str


SIZES = {
    "small": Size("ViT-S", "vits16", "coco_panoptic_eomt_small_640_dinov3"),
    "base": Size("ViT-B", "vitb16", "coco_panoptic_eomt_base_640_dinov3"),
    "large": Size("ViT-L", "vitl16", "coco_panoptic_eomt_large_640_dinov3"),
    # not published: the largest backbone with the same recipe that fits on a workstation
    "huge": Size("ViT-H+", "vith16plus", "coco_panoptic_eomt_large_640_dinov3"),
}

# prefixes of the delta's names, by prefixes of the backbone's names
ENCODER = {
    "embeddings.": "network.encoder.backbone.patch_embed.",
    "layer.": "network.encoder.backbone.blocks.",
    "norm.": "network.encoder.backbone.norm.",
}


@dataclass(frozen=True)
class Run:
    """What a process needed: wall and CPU time in seconds, peak resident memory in bytes."""

    wall: float
    cpu: float
    memory: float


# checkpoints ---------------------------------------------------------------------------------


def shapes_of(size: Size) -> tuple[dict[str, Any], Shapes, Shapes]:
    """The backbone's configuration, the shapes of its tensors, and those of the delta's."""
    layouts = json.loads((HERE.parent / "fixtures" / "layouts.json").read_text())
    config = layouts["backbones"][size.backbone]
    backbone: Shapes = config.pop("layouts")["transformers"]
    recipe = layouts["checkpoints"][size.recipe]
    width = layouts["backbones"][recipe["backbone"]]["hidden_size"]
    delta = {
        name: [config["hidden_size"] if length == width else length for length in shape]
        for name, shape in recipe["delta"].items()
        if not name.startswith("network.encoder.backbone.")
    }
    for name, shape in backbone.items():
        if name != "embeddings.mask_token":
            part = next(part for part in ENCODER if name.startswith(part))
            delta[ENCODER[part] + name.removeprefix(part)] = shape
    return config, backbone, delta


def make_checkpoint(size: Size, folder: Path) -> None:
    """Writes a random backbone and delta as they are published, one after the other."""
    import torch
    from safetensors.torch import save_file

    config, backbone, delta = shapes_of(size)
    random = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    write_backbone_config(config, folder / "config.json")
    save_file(
        {name: absolute(name, shape, random) for name, shape in backbone.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    torch.save(
        {name: difference(name, shape, random) for name, shape in delta.items()},
        folder / "pytorch_model.bin",
    )


def write_backbone_config(config: Mapping[str, Any], path: Path) -> None:
    values = {
        "model_type": "dinov3_vit",
        "architectures": ["DINOv3ViTModel"],
        "dtype": "float32",
        "hidden_act": "silu" if config["use_gated_mlp"] else "gelu",
        "image_size": 224,
        "key_bias": False,
        "layerscale_value": 1.0,
        "mlp_bias": True,
        "num_channels": 3,
        "proj_bias": True,
    }
    path.write_text(json.dumps({**config, **values}, indent=2))


def absolute(name: str, shape: list[int], random: "Generator") -> "Tensor":
    import torch

    center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return torch.randn(shape, generator=random).mul_(0.02).add_(center)


def difference(name: str, shape: list[int], random: "Generator") -> "Tensor":
    import torch

    if name == "criterion.empty_weight":
        return torch.ones(shape).index_fill_(0, torch.tensor(shape[0] - 1), 0.1)
    if name == "network.attn_mask_probs" or ".pixel_" in name:
        return torch.zeros(shape)
    if name.startswith("network.encoder."):
        return torch.randn(shape, generator=random).mul_(1e-3)
    return absolute(name, shape, random)


def check_equal(ours: Path, theirs: Path) -> None:
    """Checks that two conversions hold the same tensors, bit for bit."""
    import torch
    from safetensors import safe_open

    with (
        safe_open(ours / "model.safetensors", "pt") as our_file,
        safe_open(theirs / "model.safetensors", "pt") as their_file,
    ):
        if set(our_file.keys()) != set(their_file.keys()):
            raise SystemExit("The two conversions hold tensors of different names.")
        for name in our_file.keys():  # noqa: SIM118, a safe_open is not a dict
            tensor, expected = our_file.get_tensor(name), their_file.get_tensor(name)
            if tensor.dtype != expected.dtype or not torch.equal(
                tensor.view(torch.int32), expected.view(torch.int32)
            ):
                raise SystemExit(f"The two conversions differ in {name}.")


def apart(function: Callable[..., None], *arguments: object) -> None:
    """Calls a function in a separate process.

    Linux counts the memory of a parent process in the peak of the process that it starts. So the
    measuring process must stay small: it imports nothing large and holds no tensors.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(function, *arguments).result()


# measuring -----------------------------------------------------------------------------------


def commands(checkpoint: Path, output: Path) -> dict[str, list[str]]:
    """The command lines that convert a checkpoint, by the name of the tool."""
    ours = shutil.which("eomt-convert", path=sysconfig.get_path("scripts"))
    if ours is None:
        raise SystemExit("eomt-convert is not installed beside this Python.")
    delta = str(checkpoint / "pytorch_model.bin")
    options = ["--delta", delta, "--backbone", str(checkpoint), "--task", "panoptic"]
    options += ["--image-size", "640"]
    script = str(HERE / "transformers_way.py")
    return {
        "ours": [ours, *options, "--no-verify", "--output", str(output / "ours")],
        "verified": [ours, *options, "--output", str(output / "verified")],
        "transformers": [
            sys.executable, script, str(checkpoint), delta, str(output / "transformers")
        ],
    }  # fmt: skip


def measure(command: list[str]) -> Run:
    """Runs a command to its end."""
    with tempfile.TemporaryFile() as messages:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            messages.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{messages.read().decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def compare(checkpoint: Path, output: Path, runs: int) -> dict[str, list[Run]]:
    """Converts a checkpoint both ways, in turns, after one conversion each that is not counted."""
    lines = commands(checkpoint, output)
    for command in lines.values():
        measure(command)
    apart(check_equal, output / "ours", output / "transformers")
    shutil.rmtree(output)

    taken: dict[str, list[Run]] = {name: [] for name in lines}
    for run in range(runs):
        for name in lines if run % 2 == 0 else reversed(lines):
            taken[name].append(measure(lines[name]))
            shutil.rmtree(output)
    return taken


# the table -----------------------------------------------------------------------------------


def table(results: Mapping[str, Mapping[str, list[Run]]]) -> str:
    """The results by size, in Markdown."""
    lines = [
        "| | | eomt-convert --no-verify | eomt-convert | transformers | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for title, taken in results.items():
        for what, field, unit, scale in (
            ("wall time", "wall", " s", 1.0),
            ("CPU time", "cpu", " s", 1.0),
            ("peak memory", "memory", " MB", 1e6),
        ):
            ours, verified, theirs = (
                [getattr(run, field) / scale for run in taken[name]]
                for name in ("ours", "verified", "transformers")
            )
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            digits = 0 if unit == " MB" else 1
            cells = [spread(values, digits, unit) for values in (ours, verified, theirs)]
            cells.append(spread(ratios, 2))
            lines.append(f"| {title} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int, unit: str = "") -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f}–{high:.{digits}f})"


def conditions(runs: int) -> str:
    """Versions and machine that the figures were measured with."""
    packages = ("eomt-convert", "transformers", "torch", "safetensors", "numpy")
    return (
        f"Median (min–max) of {runs} runs each, in turns; ratio per pair of runs. "
        f"{machine(*packages)}"
    )


def machine(*packages: str) -> str:
    """Versions of Python and of packages, and the processor, in a sentence."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"Python {platform.python_version()}, {versions}; {cpu()}, {os.cpu_count()} cores."


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    """The folder for checkpoints and outputs; by default one that is deleted at the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="eomt-convert-benchmark-") as temporary:
        yield Path(temporary)


def benchmark(size: Size, folder: Path, runs: int) -> dict[str, list[Run]]:
    checkpoint = folder / size.backbone
    if not checkpoint.exists():
        unfinished = folder / f"{size.backbone}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        apart(make_checkpoint, size, unfinished)
        unfinished.rename(checkpoint)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        return compare(checkpoint, Path(temporary) / "outputs", runs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a conversion.")
    parser.add_argument("--size", choices=[*SIZES, "all"], default="small")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each, default 5")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where checkpoints are kept and outputs are written for a moment; by default a "
        "temporary folder",
    )
    arguments = parser.parse_args()
    sizes = SIZES if arguments.size == "all" else {arguments.size: SIZES[arguments.size]}
    with place(arguments.folder) as folder:
        results = {size.title: benchmark(size, folder, arguments.runs) for size in sizes.values()}
    print(f"{table(results)}\n\n{conditions(arguments.runs)}")


if __name__ == "__main__":
    main()
