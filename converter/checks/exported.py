"""Checks an exported file against the evidence, whoever made it and whatever runs it."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from converter.catalog import find_named
from converter.checks.comparison import ROUNDED
from converter.checks.diagnosis.exports import blame
from converter.checks.diagnosis.stages import Network, Skeleton
from converter.checks.exported_numbers import Judged, Runs, check_numbers, recorded_tolerance
from converter.checks.file_tensors import FileTensor, find_names, find_tensors
from converter.checks.findings import Findings
from converter.checks.outputs import write_inputs
from converter.checks.pictures import check_pictures
from converter.checks.pixels import Normalisation, read_normalisation
from converter.checks.precision import full_float32
from converter.checks.recorded import Recorded, read_recorded, recording_of
from converter.checks.structure import structure_level
from converter.checks.verdict import (
    LEVELS,
    NOTHING_RECORDED,
    NUMBERED,
    SAME_WEIGHTS,
    Level,
    Verdict,
    is_asked,
    not_asked,
)
from converter.configs import (
    CONFIGS,
    DTYPES,
    IMAGE_MEAN,
    IMAGE_STD,
    PREPROCESSOR,
    Dtype,
    read_model_config,
)
from converter.errors import MissingKernelError, RunError, UsageError
from converter.files import read_json_object, sha256
from converter.history import HISTORY, History, PastExport, read_export, read_history
from converter.hub.access import Access
from converter.models import fetch_model, repository_of, task_of, torch_device
from converter.runtimes.exported import FILES, ExportedFile, Port, StoredTensor
from converter.runtimes.network import ExportedNetwork, exported_files, read_exported
from converter.runtimes.providers import parse_providers, without_gpu
from converter.weights.merge import BUFFERS, round_to, sha256_of
from converter.weights.tensorfiles import find_weights, open_tensors
from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

# what an export may change in the configuration: its type and its image size
_OF_EXPORT = {"dtype", "torch_dtype", "image_size", "size"}


@dataclass(frozen=True)
class ExportedModel:
    """An exported file, and what is known about the model in it.

    Attributes:
        file: the exported file.
        folder: the folder with the model's configuration files; None if there is none.
        config: its config.json.
        normalisation: how its preprocessor_config.json rescales and normalises pixels; ImageNet's
            if there is none.
        history: how the model was made, if known.
        export: how it was exported, if known.
        tensors: the model's tensors that were found in the file, by name.
        misfits: sentences that say which of them have a wrong shape, and where the configuration
            beside the file is not the model's.
        digests: SHA-256 that they should have, by name; empty if unknown.
        against: where those come from.
    """

    file: ExportedFile
    folder: Path | None
    config: EomtDinov3Config | None
    normalisation: Normalisation
    history: History | None
    export: PastExport | None
    tensors: Mapping[str, FileTensor]
    misfits: tuple[str, ...]
    digests: Mapping[str, str]
    against: str

    @property
    def dtype(self) -> Dtype:
        """The type that the file computes in, as torch names it: that of most of its tensors."""
        return _dtype_of(_known(self))

    def network(self) -> Network | None:
        """The reference model with the file's weights in float32; None if some are unknown."""
        if self.config is None or self.misfits:
            return None
        skeleton = Skeleton(self.config)
        weights = {}
        for name, needed in skeleton.model.state_dict().items():
            if name in BUFFERS or not needed.numel():  # which no inference needs
                weights[name] = torch.zeros(needed.shape)
            elif name in self.tensors:
                values = np.ascontiguousarray(self.tensors[name].read().astype(np.float32))
                weights[name] = torch.from_numpy(values)
            else:
                return None
        return Network(skeleton, weights, self.normalisation)


def read_exported_model(
    path: Path,
    *,
    source: Path | None = None,
    input_name: str | None = None,
    output_names: tuple[str, str] | None = None,
) -> ExportedModel:
    """Reads an exported file, the configuration beside it, and what its tensors should be.

    Args:
        path: the exported file.
        source: the folder of the model that was exported, if known.
        input_name: the name of an ONNX file's input; by default it is recognised.
        output_names: the names of its outputs for masks and classes, likewise.

    Raises:
        UnreadableFileError: a file cannot be read, or is not an export of this kind of model.
        UsageError: there is no input or output of the given name.
    """
    file = read_exported(path, input_name=input_name, output_names=output_names)
    folder = next((each for each in (path.parent, source) if each and _has_config(each)), None)
    ours = path.name == FILES[file.format]
    history = read_history(path.parent) if ours else None
    export = read_export(path.parent) if ours else None
    config = read_model_config(folder / "config.json") if folder else None
    normalisation = Normalisation(1 / 255, IMAGE_MEAN, IMAGE_STD)
    if folder and config and (folder / PREPROCESSOR).is_file():
        normalisation = read_normalisation(folder / PREPROCESSOR, config.num_channels)
    if config is None:
        return ExportedModel(
            file, folder, config, normalisation, history, export, {}, (), {}, "nothing"
        )
    shapes = _shapes(config)
    digests: Mapping[str, str] = {}
    against = "nothing"
    if source:
        digests, against = _digests(source, _dtype_of(file.tensors.values())), "the model"
    elif export:
        rows = history.tensors if history and history.dtype == export.dtype else export.tensors
        digests, against = rows, HISTORY
    digests = {name: digest for name, digest in digests.items() if name in shapes}
    tensors = find_tensors(file.tensors, shapes, digests)
    if source:
        digests |= _digests_in_own_type(source, tensors, digests)
    misfits = tuple(_misfits(file, shapes, tensors))
    if source and folder and source != folder:
        misfits += tuple(_other_configs(folder, source))
    return ExportedModel(
        file, folder, config, normalisation, history, export, tensors, misfits, digests, against
    )


def _dtype_of(tensors: Iterable[StoredTensor]) -> Dtype:
    """The type of most elements of some tensors, as torch names it."""
    elements: Counter[str] = Counter()
    for tensor in tensors:
        elements[tensor.dtype] += math.prod(tensor.shape)
    return max(get_args(Dtype), key=lambda dtype: elements[dtype])


def _known(model: ExportedModel) -> list[StoredTensor]:
    """The model's tensors or, if they are unknown, all of the file's constants."""
    found = [tensor.stored for tensor in model.tensors.values()]
    return found or list(model.file.tensors.values())


def _has_config(folder: Path) -> bool:
    path = folder / "config.json"
    return (
        path.is_file() and read_json_object(path).get("model_type") == EomtDinov3Config.model_type
    )


def _shapes(config: EomtDinov3Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that inference needs, by name."""
    with torch.device("meta"):
        needed = EomtDinov3ForUniversalSegmentation(config).state_dict()
    return {
        name: tuple(tensor.shape)
        for name, tensor in needed.items()
        if name not in BUFFERS and tensor.numel()
    }


def _digests(source: Path, dtype: str) -> dict[str, str]:
    """SHA-256 of a model's tensors, in another type, by name."""
    with open_tensors(find_weights(source)) as file:
        return {
            name: sha256_of(round_to(file.read(name).astype(np.float32), DTYPES[dtype]))
            for name in file.tensors
        }


def _digests_in_own_type(
    source: Path, found: Mapping[str, FileTensor], digests: Mapping[str, str]
) -> dict[str, str]:
    """SHA-256 of the tensors that a file stores in another type than most of its others.

    Args:
        source: the folder of the model.
        found: its tensors in the file, by name.
        digests: SHA-256 of all of them in the type of most.
    """
    others: dict[str, str] = {}
    with open_tensors(find_weights(source)) as file:
        for name, tensor in found.items():
            if tensor.sha256 != digests.get(name) and tensor.stored.dtype in DTYPES:
                values = file.read(name).astype(np.float32)
                others[name] = sha256_of(round_to(values, DTYPES[tensor.stored.dtype]))
    return others


def _misfits(
    file: ExportedFile, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, FileTensor]
) -> Iterator[str]:
    for name, given in find_names(file.tensors, shapes):
        if name not in found:
            yield (
                f"{given} has the shape {list(file.tensors[given].shape)}, expected "
                f"{list(shapes[name])} by config.json."
            )


def _other_configs(folder: Path, source: Path) -> Iterator[str]:
    """Says where the configuration beside a file is not that of the model it was made of."""
    for name in CONFIGS:
        ours, theirs = (
            read_json_object(each / name) if (each / name).is_file() else {}
            for each in (folder, source)
        )
        for key in sorted({*ours, *theirs} - _OF_EXPORT) if ours else ():
            if ours.get(key) != theirs.get(key):
                found, expected = (json.dumps(each.get(key)) for each in (ours, theirs))
                yield f"{key} in {name} beside the file is {found}, the model's is {expected}."


@dataclass(frozen=True)
class Checks:
    """How an exported file is checked.

    Attributes:
        recorded: the recorded.safetensors to compare it with; None for the reference model.
        task: the task that the model was made for, if known.
        level: the last of the five numbered levels to check.
        providers: onnxruntime's execution providers, best first; empty for the CPU's.
    """

    recorded: Path | None = None
    task: str | None = None
    level: int = len(NUMBERED)
    providers: tuple[str, ...] = ()


def verify_exported(
    path: Path,
    *,
    recorded: str | Path | None,
    made_from: str | Path | None,
    providers: str | Sequence[str],
    input_name: str | None,
    output_names: tuple[str, str] | None,
    level: int,
    threads: int | None,
    save_inputs: Path | None,
    access: Access,
) -> Findings:
    """Checks an exported file, with the options of `converter.verify`.

    Raises:
        EomtConvertError: as `converter.verify` does.
    """
    source = fetch_model(made_from, access) if made_from else None
    model = read_exported_model(
        path, source=source, input_name=input_name, output_names=output_names
    )
    task: str | None = model.history.task if model.history else None
    if made_from and source and task is None:
        task = task_of(made_from, source)
    chosen = parse_providers(providers)
    if chosen and model.file.format != "onnx":
        raise UsageError("Only ONNX files have execution providers.", "Leave out --provider.")
    recording = _recording(path.parent, model.history, recorded)
    if recording is None and made_from and source:
        recording = _recording(source, read_history(source), None, repository_of(made_from))
    if save_inputs:
        write_inputs(save_inputs, model.normalisation, recording)
    checks = Checks(recording, task, level, chosen)
    with torch_device("cpu", threads), full_float32():
        return check_exported(model, checks)


def _recording(
    folder: Path,
    history: History | None,
    recorded: str | Path | None,
    repository: str | None = None,
) -> Path | None:
    """The recording of the model in a folder, or the one that was asked for."""
    checkpoint = history.checkpoint if history else find_named(repository)
    return recording_of(folder, checkpoint, recorded)


def check_exported(model: ExportedModel, checks: Checks) -> Findings:
    """Checks an exported file against a recording or, without one, against the reference model.

    Raises:
        UnreadableFileError: the recording cannot be read.
        UsageError: there is no such provider.
    """
    levels = {"structure": _check_structure(model)}
    if is_asked("arithmetic", checks.level):
        levels["arithmetic"] = _check_arithmetic(model)
    recorded = read_recorded(checks.recorded) if checks.recorded else None
    judged: Judged | None = None
    unknown = _why_not_normalised(model)
    if unknown and is_asked("numbers", checks.level):
        for name in ("numbers", "pictures"):
            levels[name] = Level(name, "not checked", unknown)
    elif is_asked("numbers", checks.level):
        runs = Runs(model.file, checks.providers, _num_layers(model, recorded))
        network = model.network()
        try:
            judged = check_numbers(runs, network, model.normalisation, model.dtype, recorded)
        except MissingKernelError as error:
            for name in ("numbers", "pictures"):
                levels[name] = Level(name, "not checked", error.message)
        else:
            judged = replace(judged, level=_with_basis(judged, model))
            levels["numbers"] = judged.level
            if recorded and is_asked("pictures", checks.level):
                levels["pictures"] = _check_pictures(model, judged, recorded, checks.task)
    for name in LEVELS:
        levels.setdefault(name, Level(name, "not checked", _why_not(name, checks)))
    verdict = Verdict(tuple(levels[name] for name in LEVELS))
    failed = {name for name, level in levels.items() if level.status == "failed"}
    if judged and failed & {"arithmetic", "numbers"}:
        digests = {name: tensor.sha256 for name, tensor in model.tensors.items()}
        verdict = blame(verdict, judged, digests, model.digests)
    if judged and judged.numbers and judged.target and not judged.target.computed:
        return Findings(verdict, recorded, judged.numbers.outputs)
    return Findings(verdict)


def _why_not_normalised(model: ExportedModel) -> str:
    """Why it is not known how the file's pixels are normalised; empty if it is."""
    channels = model.config.num_channels if model.config else model.file.input.shape[1]
    if channels in (None, len(model.normalisation.mean)):
        return ""
    return (
        f"There is no {PREPROCESSOR}, and how the pixels of {channels} channels are normalised is "
        "not known without it."
    )


def _why_not(level: str, checks: Checks) -> str:
    if not is_asked(level, checks.level):
        return not_asked(checks.level)
    if level == "pictures":
        return NOTHING_RECORDED
    return "An exported file is held against recordings and the reference model only."


def _num_layers(model: ExportedModel, recorded: Recorded | None) -> int:
    if model.config:
        return model.config.num_hidden_layers
    return len(recorded.numbered("hidden_states")) if recorded else 0


# structure and arithmetic ------------------------------------------------------------------------


def _check_structure(model: ExportedModel) -> Level:
    """Checks the file by the rules of its format, and against the configuration beside it."""
    problems = [*model.file.problems(), *model.misfits, *_disagreements(model), *_changes(model)]
    finite = {name: bool(np.isfinite(each.read()).all()) for name, each in model.tensors.items()}
    problems += [f"{name} holds NaN or infinity." for name, each in finite.items() if not each]
    file = model.file
    figures = {
        "format": file.format,
        "opset": file.opset,
        "inputs": {file.input.name: _axes(file.input)},
        "outputs": {port.name: _axes(port) for port in file.outputs.values()},
        "tensors": len(file.tensors),
        "parameters": sum(math.prod(each.shape) for each in _known(model)),
        "dtypes": sorted({DTYPES.get(each.dtype, each.dtype) for each in _known(model)}),
        "stored": {
            name: {
                "dtype": DTYPES.get(tensor.stored.dtype, tensor.stored.dtype),
                "shape": list(tensor.shape),
            }
            for name, tensor in model.tensors.items()
        },
        "digests": {name: tensor.sha256 for name, tensor in model.tensors.items()},
        "problems": problems,
    }
    return structure_level(problems, figures)


def _axes(port: Port) -> list[int | str]:
    return ["any" if size is None else size for size in port.shape]


def _disagreements(model: ExportedModel) -> Iterator[str]:
    """Says where the file's inputs and outputs do not fit the model's config.json."""
    config, file = model.config, model.file
    if config is None:
        return
    sides = zip(file.input.shape[2:], config.input_size, strict=True)
    if model.folder == file.path.parent and any(side not in (None, made) for side, made in sides):
        yield (
            f"The input {file.input.name} has the shape {file.input.shape_text}, but image_size in "
            f"config.json is {list(config.input_size)}."
        )
    ports = (
        ("The input", file.input, 1, config.num_channels, "num_channels"),
        ("The output", file.outputs["mask_logits"], 1, config.num_queries, "num_queries"),
        ("The output", file.outputs["class_logits"], 1, config.num_queries, "num_queries"),
        ("The output", file.outputs["class_logits"], 2, config.num_labels + 1, "classes + 1"),
    )
    for kind, port, axis, size, key in ports:
        if port.shape[axis] not in (None, size):
            yield (
                f"{kind} {port.name} has the shape {port.shape_text}, expected {size} in axis "
                f"{axis}: {key} in config.json."
            )


def _changes(model: ExportedModel) -> Iterator[str]:
    """Says what is not as conversion.json has it."""
    export, file = model.export, model.file
    if export is None:
        return
    for name, digest in export.files.items():
        path = file.path.parent / name
        if name != Path(name).name or not path.is_file():
            yield f"{name} is missing; {HISTORY} lists it."
        elif sha256(path) != digest.sha256:
            yield f"{name} was changed: its SHA-256 is not the one in {HISTORY}."
    ports = (file.input, *file.outputs.values())
    found = {
        "format": file.format,
        "opset": file.opset,
        "dtype": model.dtype,
        "input": file.input.name,
        "outputs": [port.name for port in file.outputs.values()],
        "dynamic_axes": {port.name: port.dynamic_axes for port in ports},
    }
    for key, value in found.items():
        if getattr(export, key) != value:
            yield f"{key} in {HISTORY} is {getattr(export, key)}, the file has {value}."


def _check_arithmetic(model: ExportedModel) -> Level:
    """Compares the digests of the model's tensors in the file with what they should be."""
    if not model.digests:
        reason = "The model that was exported is unknown: name it with --model."
        return Level("arithmetic", "not checked", reason)
    different = [
        name
        for name, digest in model.digests.items()
        if name not in model.tensors or model.tensors[name].sha256 != digest
    ]
    figures = {"tensors": len(model.digests), "against": model.against, "different": different}
    if not different:
        return Level("arithmetic", "passed", figures=figures)
    first = different[0]
    wrong = (
        f"is not what {model.against} says"
        if first in model.tensors
        else "is not among the tensors that the outputs are computed from"
    )
    more = f" {len(different) - 1} more tensors are wrong." if len(different) > 1 else ""
    return Level("arithmetic", "failed", f"{first} {wrong}.{more}", figures)


# numbers and pictures ----------------------------------------------------------------------------


def _with_basis(judged: Judged, model: ExportedModel) -> Level:
    """The level of the numbers, with what they rest on and which providers computed them."""
    level, target, asked = judged.level, judged.target, judged.runs.providers
    if target is None:
        return level
    if target.computed:
        rests_on = {"basis": "reference", "recorded_by": SAME_WEIGHTS, "known_recording": False}
    else:
        digests = {name: tensor.sha256 for name, tensor in model.tensors.items()}
        files = exported_files(model.file)
        if model.folder:
            files |= {name: model.folder / name for name in CONFIGS}
        digests |= {name: sha256(path) for name, path in files.items()}
        rests_on = target.recorded.origin.figures(digests)
    figures = {**level.figures, **rests_on}
    if model.dtype != "float32":
        figures["computed_in"] = model.dtype
    for dtype, tolerance in ROUNDED.items():
        if target.tolerance == tolerance:
            figures["rounded_to"] = dtype
    level = replace(level, figures=figures)
    if not asked:
        return level
    nodes = figures["providers"]["nodes"]
    ran = ", ".join(f"{name} {count}" for name, count in nodes.items())
    first = without_gpu(asked[0])
    if level.status == "passed" and not nodes.get(first):
        reason = f"{first} was asked for, but ran none of the nodes: {ran}."
        return replace(level, status="not checked", reason=reason)
    return replace(level, reason=f"{level.reason} Nodes by provider: {ran}.".strip())


def _check_pictures(
    model: ExportedModel, judged: Judged, recorded: Recorded, task: str | None
) -> Level:
    if model.folder is None or model.config is None:
        reason = f"There is no config.json and {PREPROCESSOR} beside the file."
        return Level("pictures", "not checked", reason)
    if not judged.runs.accept(recorded.pixels.shape):
        return Level("pictures", "not checked", "The file takes inputs of another size.")
    network = ExportedNetwork(model.file, judged.runs.plain, model.config)
    try:
        return check_pictures(
            network,
            model.folder,
            task,
            recorded,
            recorded_tolerance(judged, recorded),
            size_is_meant=model.export is not None,
            same_weights=judged.network.build() if judged.network else None,
        )
    except RunError as error:
        reason = f"The file fails on the recorded pictures: {error.message}"
        return Level("pictures", "failed", reason)
