"""Tables of the faults that verification finds in rounded models, and of unrelated backbones.

`benchmarks/tolerances.py` prints them. Faults are planted in the five offline checkpoints, whose
weights are then rounded, and verification is run as a user would run it.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.catalog import CATALOG
from converter.checks.numbers import bare_backbone
from converter.checks.provenance import Given, Provenance, open_sources
from converter.checks.recorded import read_recorded
from converter.configs import Dtype, read_model_config
from converter.hub.access import Access
from converter.weights.pairing import UNRELATED, correlation

State: TypeAlias = dict[str, Tensor]

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16")

# offline checkpoints with recorded outputs, by name
RECORDED: dict[str, Path] = {entry.name: entry.recorded for entry in CATALOG if entry.recorded}


def table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    """Prints a table in Markdown, each row as soon as it is computed."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


# faults -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What is wrong with a model.

    Attributes:
        title: title of its row.
        values: wrong values in configuration files, by file.
        change: changes the weights before they are rounded; returns False if the model lacks the
            tensors.
    """

    title: str
    values: Mapping[str, Mapping[str, Any]]
    change: Callable[[State], bool] = lambda _: True

    def plant(self, folder: Path, dtype: str, state: State) -> bool:
        """Writes a model with the fault, rounded to a dtype; False if it cannot have the fault."""
        state = dict(state)
        if not self.change(state):
            return False
        rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
        save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
        for file, values in self.values.items():
            content = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(content | dict(values)))
        return True


def in_preprocessor(title: str, **values: Any) -> Fault:
    return Fault(title, {"preprocessor_config.json": values})


def in_config(title: str, **values: Any) -> Fault:
    return Fault(title, {"config.json": values})


def zeroed(title: str, name: str) -> Fault:
    def change(state: State) -> bool:
        if name not in state:
            return False
        state[name] = torch.zeros_like(state[name])
        return True

    return Fault(title, {}, change)


def scaled(title: str, part: str, factor: float) -> Fault:
    def change(state: State) -> bool:
        for name in state:
            if part in name:
                state[name] = state[name] * factor
        return True

    return Fault(title, {}, change)


def with_a_weight_off(state: State) -> bool:
    name = "layers.1.attention.o_proj.weight"
    state[name] = state[name].clone()
    state[name][0, 0] += 10 * state[name].std()
    return True


FAULTS = (
    Fault("none", {}),
    in_preprocessor("image_mean 0.48, not 0.485", image_mean=[0.48, 0.456, 0.406]),
    in_preprocessor("image_std 0.225 throughout", image_std=[0.225, 0.225, 0.225]),
    in_preprocessor("rescale_factor 1/256", rescale_factor=1 / 256),
    in_config("rope_theta 90, not 100", rope_parameters={"rope_type": "default", "rope_theta": 90}),
    in_config("layer_norm_eps 1e-6, not 1e-5", layer_norm_eps=1e-6),
    in_config("layer_norm_eps 1e-4, not 1e-5", layer_norm_eps=1e-4),
    in_config("GELU's tanh approximation", hidden_act="gelu_pytorch_tanh"),
    zeroed("bias of the patch embedding 0", "embeddings.patch_embeddings.bias"),
    zeroed("bias of a norm 0", "layers.0.norm1.bias"),
    zeroed("bias of a query 0", "layers.1.attention.q_proj.bias"),
    zeroed("bias of a value 0", "layers.1.attention.v_proj.bias"),
    zeroed("bias of an MLP 0", "layers.0.mlp.up_proj.bias"),
    zeroed("bias of the mask head 0", "mask_head.fc1.bias"),
    zeroed("bias of the class head 0", "class_predictor.bias"),
    scaled("a layer's weights 1% larger", "layers.1.", 1.01),
    scaled("a layer's weights 0.1% larger", "layers.1.", 1.001),
    Fault("one weight off by ten spreads", {}, with_a_weight_off),
)

EVIDENCE = ("logits alone", "layers", "sources")


def print_faults(place: Path) -> None:
    """Prints in how many of the offline models each fault is found, by dtype and evidence."""
    header = ["fault", *(f"{dtype}: {evidence}" for dtype in DTYPES for evidence in EVIDENCE)]
    states = {}
    for name in RECORDED:
        converter.convert(name, place / f"{name}-float32", verify=False)
        states[name] = load_file(place / f"{name}-float32" / "model.safetensors")
        for dtype in DTYPES:
            converter.convert(name, place / f"{name}-{dtype}", dtype=dtype, verify=False)
            (place / f"{name}-{dtype}" / "conversion.json").unlink()
    table(header, (_row(fault, states, place) for fault in FAULTS))


def _row(fault: Fault, states: Mapping[str, State], place: Path) -> list[str]:
    cells = []
    for dtype in DTYPES:
        found = dict.fromkeys(EVIDENCE, 0)
        models = 0
        for name, state in states.items():
            folder = place / "planted"
            shutil.copytree(place / f"{name}-{dtype}", folder, dirs_exist_ok=True)
            if not fault.plant(folder, dtype, state):
                continue
            models += 1
            for evidence in EVIDENCE:
                found[evidence] += _fails(folder, name, evidence)
        cells += [f"{found[evidence]} of {models}" for evidence in EVIDENCE]
    return [fault.title, *cells]


def _fails(folder: Path, name: str, evidence: str) -> bool:
    recorded = RECORDED[name]
    sources: Any = {}
    if evidence == "sources":
        sources = {part: str(recorded / part) for part in ("delta", "backbone")}
    if evidence == "logits alone":
        tensors = read_recorded(recorded).tensors
        recorded = folder.with_name("logits")
        recorded.mkdir(exist_ok=True)
        kept = {key: tensors[key] for key in ("pixels", "mask_logits", "class_logits")}
        save_file(kept, recorded / "recorded.safetensors")
    return converter.verify(folder, recorded=recorded, **sources).verdict == "failed"


# other trainings --------------------------------------------------------------------------------


def reordered(values: Tensor, generator: torch.Generator) -> Tensor:
    """Stands for an unrelated training: the same values in another order."""
    order = torch.randperm(values.numel(), generator=generator)
    return values.flatten()[order].view_as(values)


def with_noise(size: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    def change(values: Tensor, generator: torch.Generator) -> Tensor:
        spread = values.std(correction=0)
        return values + size * spread * torch.randn(values.shape, generator=generator)

    return change


def in_8_bits(values: Tensor, _: torch.Generator) -> Tensor:
    scale = values.abs().max().clamp(min=1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


TRAININGS: tuple[tuple[str, Callable[[Tensor, torch.Generator], Tensor]], ...] = (
    ("the same values in another order", reordered),
    ("noise of 30% of the spread", with_noise(0.3)),
    ("noise of 10%", with_noise(0.1)),
    ("noise of 0.1%", with_noise(0.001)),
    ("rounded to 8 bits (e4m3)", in_8_bits),
)


def print_trainings(place: Path) -> None:
    """Prints how similar changed backbones are to the recorded ones, as correlations.

    It uses the folders that `print_faults` has written.
    """
    header = ["backbone", "weights", "outputs", "called another below"]
    table(header, (_alike(title, change, place) for title, change in TRAININGS))


def _alike(
    title: str, change: Callable[[Tensor, torch.Generator], Tensor], place: Path
) -> list[str]:
    weights, outputs = [], []
    for name, recorded in RECORDED.items():
        tokens = read_recorded(recorded).tensors["backbone.last_hidden_state"]
        pixels = read_recorded(recorded).pixels[: len(tokens)]
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        with ExitStack() as stack:
            sources = open_sources(
                Given(*(str(recorded / part) for part in ("delta", "backbone"))),
                None,
                read_model_config(place / f"{name}-float32" / "config.json"),
                "F32",
                Access.of(None, None, True),
                stack,
            )
            if not isinstance(sources, Provenance):
                raise TypeError(sources)
            backbone = bare_backbone(sources)
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            base = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
            changed = {key: change(tensor, generator) for key, tensor in base.items()}
            matrices = [key for key, tensor in base.items() if tensor.ndim > 1]
            weights.append(
                correlation(
                    tuple(each[k].flatten(1).numpy() for each in (changed, base)) for k in matrices
                )
            )
            backbone.load_state_dict(changed)
            with torch.inference_mode():
                found = backbone((pixels / 255 - mean) / std)
            backbone.load_state_dict(base)
            outputs.append(
                correlation([tuple(each.flatten(0, -2).numpy() for each in (found, tokens))])
            )
    spans = [f"{min(found):.3f} to {max(found):.3f}" for found in (weights, outputs)]
    return [title, *spans, f"{UNRELATED:g}"]
