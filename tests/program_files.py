"""Programs of torch.export, changed as a stranger might have changed them."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from reference_model import EomtDinov3ForUniversalSegmentation

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"


class Logits(nn.Module):
    """A stranger's module around the model, which returns classes before masks."""

    def __init__(self, model: EomtDinov3ForUniversalSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values)
        return output.class_queries_logits, output.masks_queries_logits


def export_logits(
    model: EomtDinov3ForUniversalSegmentation, *, dynamic: bool = False
) -> ExportedProgram:
    """Exports the model in its module, as its example in torch's documentation does it."""
    patch = model.config.patch_size
    axes = {0: Dim("batch"), 2: patch * Dim("rows"), 3: patch * Dim("columns")}
    return torch.export.export(
        Logits(model),
        (torch.zeros(2, 3, 3 * patch, 5 * patch),),
        dynamic_shapes={"pixel_values": axes} if dynamic else None,
        strict=False,
    )


def read_entries(path: Path) -> dict[str, bytes]:
    """The entries of an archive, by name without the archive's own."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write_entries(path: Path, entries: Mapping[str, bytes]) -> Path:
    """Writes an archive; entries whose names begin with a slash are outside its own folder."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name[1:] if name[0] == "/" else f"archive/{name}", content)
    return path


def change(source: Path, target: Path, edit: Callable[[dict[str, bytes]], object]) -> Path:
    """Copies an archive with other entries."""
    entries = read_entries(source)
    edit(entries)
    return write_entries(target, entries)


def change_json(
    source: Path, target: Path, edit: Callable[[dict[str, Any]], object], entry: str = PROGRAM
) -> Path:
    """Copies an archive with another description."""

    def edit_entry(entries: dict[str, bytes]) -> None:
        content = json.loads(entries[entry])
        edit(content)
        entries[entry] = json.dumps(content).encode()

    return change(source, target, edit_entry)


def limit(program: Any, axis: int, least: int, most: int | None) -> None:
    """Limits an axis of the input; height and width in patches."""
    size = program["graph_module"]["graph"]["tensor_values"]["pixel_values"]["sizes"][axis]
    symbol = size["as_expr"]["expr_str"].split("'")[1]
    program["range_constraints"][symbol] = {"min_val": least, "max_val": most}


def make_square(program: Any) -> None:
    """Makes the input's width the same multiple of the patch size as its height."""
    sizes = program["graph_module"]["graph"]["tensor_values"]["pixel_values"]["sizes"]
    sizes[3] = sizes[2]


def use_a_copy(entries: dict[str, bytes], name: str) -> None:
    """Lets a changed copy of a float32 tensor take its place; it stays in the file, unused."""
    weights, program = json.loads(entries[WEIGHTS]), json.loads(entries[PROGRAM])
    payload = weights["config"][name]
    values = np.frombuffer(entries[f"data/weights/{payload['path_name']}"], np.float32)
    entries["data/weights/weight_9999"] = (values * np.float32(1 + 1e-6)).tobytes()
    weights["config"]["copy"] = payload | {"path_name": "weight_9999"}
    for spec in program["graph_module"]["signature"]["input_specs"]:
        if spec.get("parameter", {}).get("parameter_name") == name:
            spec["parameter"]["parameter_name"] = "copy"
    entries[WEIGHTS], entries[PROGRAM] = (json.dumps(each).encode() for each in (weights, program))


def saved(content: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
