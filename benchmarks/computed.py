"""Measures what computing in 16 bits costs, to set the tolerances of `verify --dtype`.

    python benchmarks/computed.py

Prints three tables in Markdown: what each offline checkpoint's outputs lose; the largest losses of
right models beside the tolerances, on several instruction sets; and which faults these tolerances
refuse. Everything is computed eagerly, and compared with what the original computed in float32;
random models with their own outputs in float32. They have the sizes of ViT-S, or are twice as deep
and half as wide, with weights as wide as in benchmarks/tolerances.py.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from forward import config_of
from rounded import DTYPES, FAULTS, RECORDED, Fault, State, table
from safetensors.torch import load_file
from tolerances import (
    AVX2,
    WITHOUT_AVX,
    Outputs,
    Subject,
    difference,
    offline_pictures,
    offline_subject,
    process_with,
    random_subject,
    usual,
)
from torch import Tensor

from converter.checks.comparison import COMPUTED, agreement, equal_results
from converter.checks.numbers import LOGITS, judge_outputs, run
from converter.checks.pixels import read_normalisation
from converter.checks.recorded import read_recorded
from reference_model import EomtDinov3ForUniversalSegmentation as Model

SEEDS = range(4)


@dataclass(frozen=True)
class Cost:
    """What computing in 16 bits costs.

    Attributes:
        share: largest difference of the logits, as a share of their range.
        layers: the same of hidden states.
        best_class, mask_iou, same_segment: as `agreement` returns them.
        pixels: the share of pixels whose result changes; NaN without pictures.
    """

    share: float
    layers: float
    best_class: float
    mask_iou: float
    same_segment: float
    pixels: float

    @classmethod
    def of(cls, subject: Subject, outputs: Outputs, expected: Outputs) -> "Cost":
        apart = {
            name: difference(outputs[name], expected[name], of_range=True)
            for name in outputs
            if name in expected
        }
        results = equal_results(
            *(subject.segment(found, expected) for found in (outputs, expected))
        )
        return cls(
            max(apart[name] for name in LOGITS),
            max((apart[name] for name in apart if name not in LOGITS), default=0.0),
            **{key: value or 0.0 for key, value in agreement(outputs, expected).items()},
            pixels=1 - min(results.values()) if results else 0.0,
        )


def worst(costs: Sequence[Cost]) -> Cost:
    return Cost(
        max(cost.share for cost in costs),
        max(cost.layers for cost in costs),
        min(cost.best_class for cost in costs),
        min(cost.mask_iou for cost in costs),
        min(cost.same_segment for cost in costs),
        max(cost.pixels for cost in costs),
    )


def computed_in(dtype: str, subject: Subject) -> Outputs:
    model = subject.load().to(getattr(torch, dtype))
    return {name: tensor.float() for name, tensor in run(model, subject.inputs).items()}


def cells(cost: Cost) -> list[str]:
    return [
        f"{cost.share:.2%}",
        f"{cost.best_class:.1%}",
        f"{cost.mask_iou:.4f}",
        f"{1 - cost.same_segment:.2%}",
        f"{cost.pixels:.2%}",
    ]


def print_checkpoints(offline: Mapping[str, Sequence[Subject]]) -> None:
    header = ["checkpoint", "computed in", "largest difference, of the range", "same best class"]
    header += ["mask IoU", "mask pixels that change segment", "pixels whose result changes"]

    def rows() -> Iterator[Sequence[str]]:
        for name, (inputs, pictures) in offline.items():
            for dtype in DTYPES:
                found = [
                    Cost.of(each, computed_in(dtype, each), each.recorded)
                    for each in (inputs, pictures)
                ]
                shown = replace(found[0], pixels=found[1].pixels)
                yield [name, dtype, *cells(shown)]

    table(header, rows())


def deep(seed: int, place: Path, image_size: int) -> Subject:
    """A random model with 24 layers, as ViT-L has them, of half the width of ViT-S."""
    small = config_of("small", image_size)
    config = replace(
        small,
        hidden_size=192,
        num_hidden_layers=24,
        num_attention_heads=3,
        intermediate_size=768,
        num_blocks=4,
    )
    torch.manual_seed(seed)
    return random_subject(place, image_size, config)


def small(seed: int, place: Path, image_size: int) -> Subject:
    torch.manual_seed(seed)
    return random_subject(place, image_size)


def print_costs(
    groups: Mapping[str, Sequence[Subject]], processes: Mapping[str, Executor | None]
) -> None:
    header = ["computed in", "on", "models", "logits", "hidden states", "same best class"]
    header += ["mask IoU", "pixels whose result changes"]

    def rows() -> Iterator[Sequence[str]]:
        expected = {
            title: [subject.recorded or usual(subject) for subject in subjects]
            for title, subjects in groups.items()
        }
        for dtype in DTYPES:
            for instructions, pool in processes.items():
                for title, subjects in groups.items():
                    costs = [
                        Cost.of(
                            subject,
                            pool.submit(computed_in, dtype, subject).result()
                            if pool
                            else computed_in(dtype, subject),
                            theirs,
                        )
                        for subject, theirs in zip(subjects, expected[title], strict=True)
                    ]
                    yield [dtype, instructions, title, *_limits(worst(costs))]
            least = COMPUTED[dtype]
            yield [
                dtype,
                "",
                "**tolerance**",
                *[f"{least.relative:.2%}"] * 2,
                f"{least.best_class:.1%}",
                f"{least.mask_iou:.4f}",
                f"{1 - least.equal_pixels:.2%}",
            ]

    table(header, rows())


def _limits(cost: Cost) -> list[str]:
    return [
        f"{cost.share:.2%}",
        f"{cost.layers:.2%}",
        f"{cost.best_class:.1%}",
        f"{cost.mask_iou:.4f}",
        f"{cost.pixels:.2%}",
    ]


# faults -----------------------------------------------------------------------------------------


def with_tensors_swapped(state: State) -> bool:
    query, key = (f"layers.1.attention.{part}_proj.weight" for part in "qk")
    state[query], state[key] = state[key], state[query]
    return True


def with_layers_swapped(state: State) -> bool:
    names = [name.removeprefix("layers.0.") for name in state if name.startswith("layers.0.")]
    for name in names:
        first, second = f"layers.0.{name}", f"layers.1.{name}"
        state[first], state[second] = state[second], state[first]
    return True


def with_a_layer_replaced(state: State) -> bool:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.startswith("layers.1.") and tensor.ndim > 1:
            order = torch.randperm(tensor.numel(), generator=generator)
            state[name] = tensor.flatten()[order].view_as(tensor)
    return True


def with_masks_on(state: State) -> bool:
    state["attn_mask_probs"] = torch.ones_like(state["attn_mask_probs"])
    return True


OTHERS = (
    Fault("query and key of a layer swapped", {}, with_tensors_swapped),
    Fault("two layers swapped", {}, with_layers_swapped),
    Fault("a layer's matrices in another order", {}, with_a_layer_replaced),
    Fault("masked attention on", {}, with_masks_on),
)


def print_faults(offline: Mapping[str, Sequence[Subject]], place: Path) -> None:
    """Prints in how many of the offline models the logits alone show a fault."""

    def row(fault: Fault) -> list[str]:
        found = []
        for dtype in DTYPES:
            refused = models = 0
            for name, (inputs, _) in offline.items():
                folder = place / "planted"
                folder.mkdir(exist_ok=True)
                for file in ("config.json", "preprocessor_config.json"):
                    (folder / file).write_bytes((inputs.folder / file).read_bytes())
                state: dict[str, Tensor] = load_file(inputs.folder / "model.safetensors")
                if fault.plant(folder, dtype, state):
                    models += 1
                    refused += _refused(dtype, folder, RECORDED[name])
            found.append(f"{refused} of {models}")
        return [fault.title, *found]

    header = ["fault", *(f"computed in {dtype}" for dtype in DTYPES)]
    table(header, (row(fault) for fault in (*FAULTS, *OTHERS)))


def _refused(dtype: str, folder: Path, path: Path) -> bool:
    recorded = read_recorded(path)
    model = Model.from_pretrained(folder)  # in the dtype of the file
    inputs = read_normalisation(folder / "preprocessor_config.json", 3)(recorded.pixels)
    outputs = {name: tensor.float() for name, tensor in run(model, inputs, layers=False).items()}
    logits = {name: outputs[name] for name in LOGITS}
    return judge_outputs(logits, recorded, COMPUTED[dtype]).level.status == "failed"


def main() -> None:
    parser = argparse.ArgumentParser(description="What computing in 16 bits costs.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--image-size", type=int, default=192, help="of random models, default 192")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    makers: Mapping[str, Callable[[int, Path, int], Subject]] = {"ViT-S": small, "24 layers": deep}
    with (
        tempfile.TemporaryDirectory() as folder,
        process_with(AVX2, arguments.threads) as avx2,
        process_with(WITHOUT_AVX, arguments.threads) as without_avx,
    ):
        place = Path(folder)
        offline = {
            name: (
                offline_subject(name, recorded, place / name),
                offline_pictures(recorded, place / name),
            )
            for name, recorded in RECORDED.items()
        }
        print_checkpoints(offline)
        groups: dict[str, Sequence[Subject]] = {
            "offline": [subject for pair in offline.values() for subject in pair]
        }
        for title, make in makers.items():
            groups[title] = [
                make(seed, place / f"{title}-{seed}", arguments.image_size) for seed in SEEDS
            ]
        processes = {"this CPU": None, "up to AVX2": avx2, "before AVX": without_avx}
        print_costs(groups, processes)
        print_faults(offline, place)


if __name__ == "__main__":
    main()
