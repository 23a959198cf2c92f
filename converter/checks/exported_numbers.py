"""Runs an exported file, and compares its outputs with a recording or the reference model's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from converter.checks.comparison import ROUNDED, Tolerance, computed_tolerance
from converter.checks.diagnosis.by_value import is_coarse
from converter.checks.diagnosis.stages import Network
from converter.checks.numbers import Numbers, judge_as_reference, judge_outputs
from converter.checks.pixels import Normalisation
from converter.checks.recorded import Origin, Recorded
from converter.checks.verdict import Level
from converter.configs import coarsest
from converter.errors import RunError
from converter.runtimes.exported import ExportedFile, ExportedSession, Port
from converter.runtimes.network import run_in_batches
from converter.runtimes.providers import CPU
from reference_model import EomtDinov3Config

# seed of the random pixels that are compared where nothing was recorded
_SEED = 0

# largest input that is tried, in values: a file from outside may ask for any size
_LARGEST = 2**28

# why no size near a usual one is tried, if the file would take the usual one
_UNUSABLE = "it is too large to try, or not a multiple of the patch size"


@dataclass(frozen=True)
class Runs:
    """An exported file, and how it is run.

    Attributes:
        file: the exported file.
        providers: onnxruntime's execution providers that were asked for; empty for the CPU's.
        layers: the network's number of layers; 0 if unknown.
    """

    file: ExportedFile
    providers: tuple[str, ...]
    layers: int

    @cached_property
    def plain(self) -> ExportedSession:
        """Runs the file as its users do.

        Raises:
            MissingKernelError: the provider lacks an operator in the file's type.
            UsageError: a provider is not available.
            UnreadableFileError: the runtime refuses the file.
        """
        return self._open(0)

    def _open(self, layers: int) -> ExportedSession:
        # a provider that is named is profiled
        named = self.providers or ((CPU,) if self.file.format == "onnx" else ())
        return self.file.open(named, layers)

    def accept(self, shape: Sequence[int]) -> bool:
        """Whether the file takes inputs of this (batch, channels, height, width).

        A batch may be repeated to fill one that the file takes.
        """
        batch = self.file.input.axes[0].nearest(shape[0])
        filled = (batch or 0, *shape[1:])
        return math.prod(filled) <= _LARGEST and not self.file.input.problem_with(filled)

    def nodes_by_provider(self) -> dict[str, int]:
        """How many nodes each execution provider ran; empty if `plain` was not opened."""
        return self.plain.nodes_by_provider() if "plain" in vars(self) else {}

    def outputs(self, inputs: Tensor, *, layers: bool = False) -> dict[str, Tensor]:
        """The file's outputs, by the names of recorded tensors, in the network's order.

        Args:
            inputs: (batch, channels, height, width), rescaled and normalised.
            layers: also return every layer's output, as far as the file shows them. They come from
                another session, which is closed before the first is opened: each holds the weights.

        Raises:
            RunError: the runtime fails.
            EomtConvertError: it has not enough memory; or as in `plain`.
        """
        batch = self.file.input.axes[0]
        found = (
            run_in_batches(self._open(self.layers), inputs, batch) if layers and self.layers else {}
        )
        found |= run_in_batches(self.plain, inputs, batch)  # the same names keep their places
        return {name: torch.from_numpy(values) for name, values in found.items()}


@dataclass(frozen=True)
class Target:
    """What a file's outputs are compared with.

    Attributes:
        recorded: a recording, or the reference model's outputs like one.
        tolerance: how far apart they may be.
        computed: whether the reference model computed them just now, with the file's weights.
    """

    recorded: Recorded
    tolerance: Tolerance
    computed: bool = False


@dataclass(frozen=True)
class Judged:
    """The numbers of an exported file.

    Attributes:
        level: the level's line in the verdict.
        runs: what ran the file.
        network: the reference model with the file's weights; None if some are unknown.
        normalisation: of the pixels.
        dtype: what the file computes in, as torch names it.
        rounded: the 16-bit type of each tensor that was rounded, by name.
        target: what its outputs were compared with; None if they were not.
        numbers: its outputs and how they compare; None likewise.
    """

    level: Level
    runs: Runs
    network: Network | None
    normalisation: Normalisation
    dtype: str
    rounded: Mapping[str, str]
    target: Target | None = None
    numbers: Numbers | None = None

    @property
    def tolerance(self) -> Tolerance:
        """How far its outputs may be from those of the reference model with the same weights."""
        return computed_tolerance(self.dtype)


def check_numbers(
    runs: Runs,
    network: Network | None,
    normalisation: Normalisation,
    dtype: str,
    recorded: Recorded | None,
) -> Judged:
    """Runs an exported file, and compares its outputs.

    They are compared with the recording's, if there is one and the file takes inputs of its size;
    and, if all weights are known, with those of the reference model, for random pixels. The first
    comparison that fails decides, or else the first of all.

    Args:
        runs: the file.
        network: the reference model with the file's weights; None if some are unknown.
        normalisation: of the pixels.
        dtype: what the file computes in, as torch names it.
        recorded: the recording, if there is one.

    Raises:
        MissingKernelError, UsageError, UnreadableFileError: as in `Runs.plain`.
    """
    rounded = _rounded(network.weights if network else _constants(runs.file))
    shapes, untried = _shapes(runs.file.input, network.config) if network else ([], [])
    reason = " ".join(untried) or _nothing_to_compare(runs, recorded)
    unjudged = Level("numbers", "not checked", reason)
    judged = Judged(unjudged, runs, network, normalisation, dtype, rounded)
    found: list[Judged] = []
    for target in _targets(judged, recorded, shapes):
        found.append(judge(judged, target))
        if found[-1].level.status == "failed":
            break
    failed = bool(found) and found[-1].level.status == "failed"
    chosen = (found or [judged])[-1 if failed else 0]
    inputs = [list(each.target.recorded.pixels.shape) for each in found if each.target]
    providers = {"asked": list(runs.providers), "nodes": runs.nodes_by_provider()}
    figures = {**chosen.level.figures, "inputs": inputs, "providers": providers}
    remarks = [_remark(chosen, recorded), *([] if failed or not found else untried)]
    reason = " ".join(filter(None, (chosen.level.reason, *remarks)))
    return replace(chosen, level=replace(chosen.level, reason=reason, figures=figures))


def _constants(file: ExportedFile) -> dict[str, Tensor]:
    """The constants of a file in float32, by name, where the model's tensors are unknown."""
    return {
        name: torch.from_numpy(tensor.read().astype(np.float32))
        for name, tensor in file.tensors.items()
    }


def _rounded(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The 16-bit type of each tensor that was rounded, by name; empty unless most elements were."""
    coarse = {name: is_coarse(tensor) for name, tensor in tensors.items()}
    rounded = {name: dtype for name, dtype in coarse.items() if dtype}
    size = sum(tensors[name].numel() for name in rounded)
    return rounded if 2 * size > sum(tensor.numel() for tensor in tensors.values()) else {}


def _remark(judged: Judged, recorded: Recorded | None) -> str:
    """What the outputs were compared with, where that is not the recording alone; a sentence."""
    target, network = judged.target, judged.network
    if target is None or judged.numbers is None:
        return ""
    shape = _shown(target.recorded.pixels.shape)
    if target.computed and judged.level.status == "failed":
        return f"This is beside the reference model with the same weights, for pixels of {shape}."
    if recorded and target.computed:
        return "The file does not take inputs of the recorded size."
    if network is None and None in judged.runs.file.input.shape:
        return f"Only inputs of {shape} were run: others need the model, with --model."
    return ""


def recorded_tolerance(judged: Judged, recorded: Recorded) -> Tolerance:
    """How far the outputs of a file may be from recorded ones."""
    rounded_to, origin = coarsest(judged.rounded.values()), recorded.origin
    computed = computed_tolerance(judged.dtype, origin.computed_in)
    if rounded_to is None or origin.rounded_to:
        return computed
    # weights in bfloat16 may move outputs further than computing in float16
    return max(computed, ROUNDED[rounded_to], key=lambda tolerance: tolerance.relative)


def _targets(
    judged: Judged, recorded: Recorded | None, shapes: Sequence[tuple[int, ...]]
) -> Iterator[Target]:
    """What the outputs are compared with: the recording, then the reference model.

    A recording shows one batch and one size, and a graph may have these baked in.

    Args:
        judged: the file.
        recorded: the recording, if there is one.
        shapes: of the pixels for the reference model.
    """
    network = judged.network
    if recorded and judged.runs.accept(recorded.pixels.shape):
        yield Target(recorded, recorded_tolerance(judged, recorded))
    if network:
        # in random pixels there is nothing for classes and masks to agree on
        tolerance = replace(judged.tolerance, best_class=0.0, mask_iou=0.0)
        for shape in shapes:
            yield Target(computed_by(network, random_pixels(shape)), tolerance, computed=True)


def _shapes(port: Port, config: EomtDinov3Config) -> tuple[list[tuple[int, ...]], list[str]]:
    """Inputs of two batch sizes and two image sizes, as far as a file takes them.

    Args:
        port: the file's input.
        config: the model's.

    Returns:
        Their shapes; and sentences that name the usual ones that the file does not take.
    """
    patch, channels = config.patch_size, config.num_channels
    first = _fixed(port, (1, channels, *config.input_size))
    near = _nearest(port, first, patch)
    batch, _, height, width = near or first
    # a program of torch.export takes two patches or more
    smaller = max(height // 2 // patch, 2) * patch, (width // 2 // patch + 2) * patch
    larger = height + 2 * patch, width + patch
    second, third = (_fixed(port, (batch + 1, channels, *size)) for size in (smaller, larger))
    others = [_nearest(port, each, patch) for each in (second, third)]
    of_another_size = (each for each in others if each and each[2:] != (height, width))
    other = next(of_another_size, others[0])
    untried = [
        f"Pixels of {_shown(wanted)} were not tried: {problem}."
        for wanted, found in ((first, near), (second, other))
        if (problem := port.problem_with(wanted) or ("" if found else _UNUSABLE))
    ]
    return list(dict.fromkeys(filter(None, (near, other)))), untried


def _fixed(port: Port, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with the sizes that an input has fixed; channels are the model's."""
    sizes = tuple(fixed or size for fixed, size in zip(port.shape, shape, strict=True))
    return sizes[0], shape[1], *sizes[2:]


def _nearest(port: Port, shape: tuple[int, ...], patch: int) -> tuple[int, ...] | None:
    """The nearest shape to try that an input takes; None if there is none."""
    found = port.nearest(shape, patch)
    if found is None or found[1] != shape[1] or math.prod(found) > _LARGEST:
        return None
    return found


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def random_pixels(shape: tuple[int, ...]) -> Tensor:
    """Uniformly random pixels, uint8, always the same ones.

    Args:
        shape: (batch, channels, height, width).
    """
    generator = np.random.default_rng(_SEED)
    return torch.from_numpy(generator.integers(256, size=shape, dtype=np.uint8))


def computed_by(network: Network, pixels: Tensor) -> Recorded:
    """What the reference model computes on the CPU in float32, like a recording.

    Args:
        network: the reference model with weights.
        pixels: (batch, channels, height, width) uint8.
    """
    return Recorded(Path(), "", Origin("reference"), {"pixels": pixels, **network.run(pixels)})


def _nothing_to_compare(runs: Runs, recorded: Recorded | None) -> str:
    if recorded is None:
        return "There are no recorded outputs, and the model's weights in this file are unknown."
    height, width = recorded.pixels.shape[-2:]
    return (
        f"The file takes inputs of {runs.file.input.shape_text}, recorded were {height}x{width} "
        "pixels, and the model's weights in this file are unknown."
    )


def judge(judged: Judged, target: Target) -> Judged:
    """Compares a file's outputs; rounding errors that the reference model has too are allowed for.

    Args:
        judged: the file; what was found of it before is replaced.
        target: what to compare its outputs with.
    """
    recorded = target.recorded
    judged = replace(judged, target=target)
    channels = recorded.pixels.shape[1]
    if channels != len(judged.normalisation.mean):
        reason = f"The model cannot run on the recorded input: it has {channels} channels."
        return replace(judged, level=Level("numbers", "failed", reason))
    inputs = judged.normalisation(recorded.pixels)
    try:
        numbers = _compare(judged, target, inputs)
    except RunError as error:
        port = judged.runs.file.input
        takes = port.shape_text if any(port.shape[2:]) else "any size"
        reason = (
            f"The file fails on pixels of {_shown(recorded.pixels.shape)}, although its input says "
            f"that it takes {takes}: {error.message}"
        )
        return replace(judged, level=Level("numbers", "failed", reason), numbers=None)
    return replace(judged, level=numbers.level, numbers=numbers)


def _compare(judged: Judged, target: Target, inputs: Tensor) -> Numbers:
    recorded, network = target.recorded, judged.network
    layers = not target.computed and "last_hidden_state" in recorded.tensors
    outputs = judged.runs.outputs(inputs, layers=layers)
    numbers = judge_outputs(outputs, recorded, target.tolerance)
    if numbers.level.status == "failed" and not layers:  # to see where it begins
        outputs = judged.runs.outputs(inputs, layers=True)
        numbers = judge_outputs(outputs, recorded, target.tolerance)
    if network and numbers.level.status == "failed" and judged.dtype == "float32":
        numbers = judge_as_reference(outputs, recorded, target.tolerance, network.build(), inputs)
    return numbers
