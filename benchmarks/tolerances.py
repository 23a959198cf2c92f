"""Measures how much correct computations of a model differ, to set verification's tolerances.

    python benchmarks/tolerances.py

Runs the offline checkpoints and a model of ViT-S's sizes in every way that leaves a model right,
and prints the largest differences beside the tolerances, as a table in Markdown. The ViT-S has
random weights, so wide that its logits reach 60, as those of the published models do. Results are
segments by every task that the inputs allow, from the masks of one way and the classes of the usual
one, as verification makes them; their difference is the share of a picture's pixels.

Further tables are of single layers, each run on what was computed before it, and of what rounding
does to models; then of faults that verification finds in rounded models, and of how alike two
trainings are (benchmarks/rounded.py). benchmarks/computed.py measures what computing in 16 bits
costs.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeAlias
from unittest.mock import patch

import torch
from forward import config_of
from PIL import Image
from rounded import print_faults, print_trainings, table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import converter
from converter.catalog import CATALOG
from converter.checks.comparison import (
    FLOAT32,
    ROUNDED,
    TOLERANCE,
    agreement,
    equal_results,
)
from converter.checks.diagnosis.stages import (
    STAGE_RIGHT,
    STAGE_TOLERANCE,
    Network,
    Skeleton,
    Stage,
    cut,
)
from converter.checks.numbers import LOGITS, masked_predictions, run
from converter.checks.pipeline import Prepared, prepare, segment
from converter.checks.pixels import read_normalisation
from converter.checks.recorded import Origin, Recorded, read_pictures, read_recorded
from converter.checks.rounding import (
    EXCESS,
    RIGHT_EXCESS,
    allowing_for_rounding,
    with_rounding_error,
)
from reference_model import EomtDinov3Config, EomtImageProcessor
from reference_model import EomtDinov3ForUniversalSegmentation as Model

Outputs: TypeAlias = Mapping[str, Tensor]

# standard deviation of the random weights; with the config's, 0.02, logits stay below 2
WEIGHT_STD = 0.06

# environment variables that torch, oneDNN and MKL read when a process starts
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
WITHOUT_AVX = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
}

KINDS = {
    "logits": ("mask_logits", "class_logits"),
    "hidden states": ("patch_embeddings", "hidden_states.", "last_hidden_state"),
    "masked logits": ("masked.",),
}
RESULTS = "results"


@dataclass(frozen=True)
class Subject:
    """A model and its input.

    Attributes:
        folder: of the model.
        pixels: (batch, channels, height, width) uint8.
        inputs: the same, normalised.
        recorded: what the original computed on another machine; empty if nothing was recorded.
        masks: the mask logits that mask each block's attention, as verification takes them from a
            recording; empty to leave masked attention out.
        pictures: that the input was made of; None if it was not.
    """

    folder: Path
    pixels: Tensor
    inputs: Tensor
    recorded: Outputs
    masks: Sequence[Tensor]
    pictures: Prepared | None = None

    def load(self) -> Model:
        return Model.from_pretrained(self.folder)

    def compute(self, model: Model, inputs: Tensor) -> Outputs:
        """Computes the outputs that verification compares."""
        outputs = run(model, inputs)
        if not self.masks:
            return outputs
        return outputs | masked_predictions(model, inputs, self.masks)

    def segment(self, outputs: Outputs, expected: Outputs) -> Outputs:
        """Results for every task, with the expected class logits."""
        if self.pictures is None:
            return {}
        processor = EomtImageProcessor.from_pretrained(self.folder)
        logits = {f"pipeline.{name}": outputs[name].float() for name in LOGITS}
        logits["pipeline.class_logits"] = expected["class_logits"]
        windows = self.pictures.origins is not None
        tasks = ("semantic",) if windows else ("panoptic", "instance", "semantic")
        results: dict[str, Tensor] = {}
        for task in tasks:
            results |= segment(processor, task, logits, self.pictures)
        return results


def offline_subject(name: str, recorded: Path, place: Path) -> Subject:
    converter.convert(name, place, verify=False)
    found = read_recorded(recorded)
    masks = found.numbered("masked.mask_logits")[:-1]
    return Subject(place, found.pixels, _normalised(found.pixels, place), found.tensors, masks)


def offline_pictures(recorded: Path, place: Path) -> Subject:
    """The pictures of an offline checkpoint that is already converted."""
    pictures = read_pictures(read_recorded(recorded))
    if isinstance(pictures, str):
        raise TypeError(pictures)
    inputs = prepare(EomtImageProcessor.from_pretrained(place), pictures.images)
    theirs = {name: pictures.tensors[f"pipeline.{name}"] for name in LOGITS}
    return Subject(place, inputs.pixels, inputs.values, theirs, (), inputs)


def random_subject(place: Path, image_size: int, config: EomtDinov3Config | None = None) -> Subject:
    """A model of random weights, by default of ViT-S's sizes, and two random pictures."""
    config = replace(config or config_of("small", image_size), initializer_range=WEIGHT_STD)
    model = Model(config)
    model.attn_mask_probs.zero_()  # as in a converted model
    model.save_pretrained(place)
    size = {"height": image_size, "width": image_size}
    processor = EomtImageProcessor(size=size, do_pad=True)
    processor.save_pretrained(place)
    pixels = torch.randint(256, (2, 3, image_size, image_size), dtype=torch.uint8)
    inputs = prepare(
        processor, [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]
    )
    found = masked_predictions(model.eval(), inputs.values)
    masks = [found[f"masked.mask_logits.{block}"] for block in range(config.num_blocks)]
    return Subject(place, inputs.pixels, inputs.values, {}, masks, inputs)


def _normalised(pixels: Tensor, folder: Path) -> Tensor:
    return read_normalisation(folder / "preprocessor_config.json", pixels.shape[1])(pixels)


# ways to compute that are all correct -----------------------------------------------------------


def usual(subject: Subject) -> Outputs:
    return subject.compute(subject.load(), subject.inputs)


def on_one_thread(subject: Subject) -> Outputs:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    outputs = usual(subject)
    torch.set_num_threads(threads)
    return outputs


def with_plain_attention(subject: Subject) -> Outputs:
    with sdpa_kernel(SDPBackend.MATH):
        return usual(subject)


def with_contiguous_pixels(subject: Subject) -> Outputs:
    return subject.compute(subject.load(), subject.inputs.contiguous())


def one_by_one(subject: Subject) -> Outputs:
    model = subject.load()
    parts = []
    for i, inputs in enumerate(subject.inputs.split(1)):
        picture = replace(subject, masks=[mask[i : i + 1] for mask in subject.masks])
        parts.append(picture.compute(model, inputs))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def in_process(pool: Executor, subject: Subject) -> Outputs:
    return pool.submit(usual, subject).result()


def as_recorded(subject: Subject) -> Outputs:
    return subject.recorded


def with_weights_in(dtype: torch.dtype, subject: Subject) -> Outputs:
    return subject.compute(subject.load().to(dtype).float(), subject.inputs)


def in_float64(subject: Subject) -> Outputs:
    return subject.compute(subject.load().double(), subject.inputs.double())


@contextmanager
def process_with(environment: Mapping[str, str], threads: int) -> Iterator[Executor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        # set only while the process starts: this process would read them, too
        with patch.dict(os.environ, environment):
            pool.submit(torch.set_num_threads, threads).result()  # starts the process
        yield pool


# the table --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way of computing, compared with the usual one.

    Attributes:
        title: what is different.
        compute: computes a model's outputs in that way.
        dtype: torch's name of the weights' dtype.
    """

    title: str
    compute: Callable[[Subject], Outputs]
    dtype: str = "float32"

    @property
    def of_range(self) -> bool:
        """Whether the tolerance is a share of the recorded range."""
        return self.dtype != "float32"

    def measure(self, subject: Subject, expected: Outputs) -> dict[str, float]:
        """The largest difference in each kind of outputs; NaN if there are none."""
        outputs = self.compute(subject)
        found = dict.fromkeys((*KINDS, RESULTS), math.nan)
        if outputs and subject.pictures:
            shares = equal_results(*(subject.segment(o, expected) for o in (outputs, expected)))
            found[RESULTS] = 1 - min(shares.values())
        for kind, prefixes in KINDS.items():
            for name in expected:
                if name.startswith(prefixes) and name in outputs:
                    largest = difference(outputs[name], expected[name], of_range=self.of_range)
                    found[kind] = max(largest, found[kind], key=_or_least)
        return found

    def cells(self, measured: list[float], results: list[float]) -> list[str]:
        """The cells with the differences, then the tolerance and how often they fit into it.

        Args:
            measured: differences in each kind of outputs.
            results: differing shares of pixels.
        """
        limits = ROUNDED.get(self.dtype, FLOAT32)
        tolerance = limits.relative if self.of_range else TOLERANCE
        return [
            self.title,
            *(_shown(value, of_range=self.of_range) for value in measured),
            *self._limit(measured, tolerance, of_range=self.of_range),
            *(_shown(value, of_range=True) for value in results),
            *self._limit(results, round(1 - limits.equal_pixels, 9), of_range=True),
        ]

    def _limit(self, measured: list[float], tolerance: float, *, of_range: bool) -> list[str]:
        largest = max(measured, key=_or_least)
        margin = f"{tolerance / largest:.1f}" if largest > 0 else "exact"
        return [_shown(tolerance, of_range=of_range), margin]


def _shown(value: float, *, of_range: bool) -> str:
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    return f"{100 * value:.2g}%" if of_range else f"{value:.1e}"


def _or_least(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def difference(ours: Tensor, expected: Tensor, *, of_range: bool) -> float:
    """The largest absolute difference, or its share of the range of the expected values."""
    batch = min(len(ours), len(expected))  # hidden states may be recorded for one picture only
    largest = float((ours[:batch].double() - expected[:batch].double()).abs().max())
    return largest / float(expected.max() - expected.min()) if of_range else largest


def rows(avx2: Executor, without_avx: Executor, threads: int) -> list[Row]:
    return [
        Row(f"1 thread, not {threads}", on_one_thread),
        Row("attention by its definition, not fused", with_plain_attention),
        Row("pixels channels first in memory, not last", with_contiguous_pixels),
        Row("pictures one by one, not as a batch", one_by_one),
        Row("instructions up to AVX2", partial(in_process, avx2)),
        Row("instructions before AVX", partial(in_process, without_avx)),
        Row("the original on a CPU with AVX-512", as_recorded),
        Row("computed in float64", in_float64),
        Row("weights in bfloat16", partial(with_weights_in, torch.bfloat16), "bfloat16"),
        Row("weights in float16", partial(with_weights_in, torch.float16), "float16"),
    ]


# layers by themselves ----------------------------------------------------------------------------


def network_of(subject: Subject) -> Network:
    model = subject.load()
    normalisation = read_normalisation(subject.folder / "preprocessor_config.json", 3)
    return Network(Skeleton(model.config), model.state_dict(), normalisation)


def layers_of(subject: Subject, expected: Outputs, network: Network) -> tuple[Stage, ...]:
    """The network cut into layers, each to be run on the expected output of the one before."""
    tensors = {**expected, "pixels": subject.pixels}
    return cut(Recorded(Path(), "", Origin(), tensors), network.config)


def layer_error(subject: Subject, expected: Outputs) -> float:
    """The largest difference of a layer, as a share of its largest output value."""
    network = network_of(subject)
    return max(
        stage.difference(network) / float(stage.end.abs().max())
        for stage in layers_of(subject, expected, network)
    )


def layer_error_with_plain_attention(subject: Subject, expected: Outputs) -> float:
    with sdpa_kernel(SDPBackend.MATH):
        return layer_error(subject, expected)


def layer_error_in_process(pool: Executor, subject: Subject, expected: Outputs) -> float:
    return pool.submit(layer_error, subject, expected).result()


def print_layers(
    groups: list[list[Subject]], expected: list[list[Outputs]], avx2: Executor, plain: Executor
) -> None:
    ways: list[tuple[str, Callable[[Subject, Outputs], float]]] = [
        ("attention by its definition, not fused", layer_error_with_plain_attention),
        ("instructions up to AVX2", partial(layer_error_in_process, avx2)),
        ("instructions before AVX", partial(layer_error_in_process, plain)),
    ]

    def rows() -> Iterator[Sequence[str]]:
        for title, way in ways:
            errors = [max(map(way, *pair)) for pair in zip(groups, expected, strict=True)]
            limits = (STAGE_RIGHT, STAGE_TOLERANCE)
            yield [title, *(f"{value:.1e}" for value in (*errors, *limits))]

    table(["each layer by itself", "offline", "ViT-S", "right", "tolerance"], rows())


# weights in 16 bits ------------------------------------------------------------------------------

# number of draws of other weights that round to the same values
DRAWS = 20


@dataclass(frozen=True)
class Rounding:
    """What rounding does to a model.

    Attributes:
        excess: how far a layer is off, in units of what random weights that round to the same do.
        best_class, mask_iou: smallest agreement with the outputs before rounding.
    """

    excess: float
    best_class: float
    mask_iou: float


def rounding_of(dtype: str, subject: Subject, expected: Outputs) -> Rounding:
    network = network_of(subject)
    exact = network.weights
    kind = getattr(torch, dtype)
    network = network.with_weights({n: tensor.to(kind).float() for n, tensor in exact.items()})
    types = dict.fromkeys(exact, dtype)
    excess = [
        EXCESS * stage.difference(network) / stage.tolerance
        for stage in allowing_for_rounding(layers_of(subject, expected, network), network, types)
        if stage.mean_square
    ]
    rounded = network.run(subject.pixels)
    agreed = [agreement(rounded, expected)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(DRAWS):
        drawn = {
            name: with_rounding_error(tensor, dtype, generator)
            for name, tensor in network.weights.items()
        }
        agreed.append(agreement(rounded, network.with_weights(drawn).run(subject.pixels)))
    least = {key: min(each[key] or 0.0 for each in agreed) for key in ("best_class", "mask_iou")}
    return Rounding(max(excess), **least)


def print_rounding(groups: list[list[Subject]], expected: list[list[Outputs]]) -> None:
    titles = ("offline", "ViT-S")
    header = ["weights in"]
    for measure, limits in (
        ("a layer, beside rounding", ["right", "at most"]),
        ("same best class", ["at least"]),
        ("mask IoU", ["at least"]),
    ):
        header += [*(f"{title}: {measure}" for title in titles), *limits]

    def rows() -> Iterator[Sequence[str]]:
        for dtype, limits in ROUNDED.items():
            found = [
                list(map(partial(rounding_of, dtype), *pair))
                for pair in zip(groups, expected, strict=True)
            ]
            excess = [max(each.excess for each in group) for group in found]
            classes = [min(each.best_class for each in group) for group in found]
            masks = [min(each.mask_iou for each in group) for group in found]
            yield [
                dtype,
                *(f"{value:.2f}" for value in (*excess, RIGHT_EXCESS, EXCESS)),
                *(f"{value:.1%}" for value in (*classes, limits.best_class)),
                *(f"{value:.4f}" for value in (*masks, limits.mask_iou)),
            ]

    table(header, rows())


def main() -> None:
    parser = argparse.ArgumentParser(description="Differences between right computations.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--image-size", type=int, default=640, help="of the ViT-S, default 640")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        process_with(AVX2, arguments.threads) as avx2,
        process_with(WITHOUT_AVX, arguments.threads) as without_avx,
    ):
        place = Path(folder)
        offline = [
            subject
            for entry in CATALOG
            if entry.recorded
            for subject in (
                offline_subject(entry.name, entry.recorded, place / entry.name),
                offline_pictures(entry.recorded, place / entry.name),
            )
        ]
        groups = [offline, [random_subject(place / "small", arguments.image_size)]]
        expected = [[usual(subject) for subject in group] for group in groups]
        kinds = [f"{title}: {kind}" for title in ("offline", "ViT-S") for kind in KINDS]
        results = [f"{title}: {RESULTS}" for title in ("offline", "ViT-S")]
        limit = ["tolerance", "margin"]
        header = ["", *kinds, *limit, *results, *limit]
        print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
        for row in rows(avx2, without_avx, arguments.threads):
            measured, shares = [], []
            for group, outputs in zip(groups, expected, strict=True):
                found = list(map(row.measure, group, outputs))
                measured += [max((f[kind] for f in found), key=_or_least) for kind in KINDS]
                shares.append(max((f[RESULTS] for f in found), key=_or_least))
            print(f"| {' | '.join(row.cells(measured, shares))} |", flush=True)
        print_layers(groups, expected, avx2, without_avx)
        print_rounding(groups, expected)
        print_faults(place)
        print_trainings(place)


if __name__ == "__main__":
    main()
