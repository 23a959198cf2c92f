"""Exports a model to run elsewhere, and checks what was written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from converter.catalog import Task, find_named
from converter.checks.findings import Findings, write_page
from converter.checks.recorded import recording_of
from converter.checks.verdict import Verdict, unverified
from converter.configs import (
    DTYPES,
    PREPROCESSOR,
    check_image_size,
    preprocessor_config,
    read_config,
)
from converter.destination import keep_rejected, made_files, page_beside, rejected_place
from converter.errors import (
    EomtConvertError,
    OutputsDifferError,
    UnreadableFileError,
    UsageError,
)
from converter.files import (
    Digests,
    digests_of,
    digests_to_dict,
    prepare_place,
    read_json_object,
    real_path,
    sha256,
    user_path,
    writable,
    write_json,
)
from converter.history import (
    HISTORY,
    REPORT,
    ExportDtype,
    Format,
    History,
    PastExport,
    read_history,
    write_history,
)
from converter.hub.access import Access
from converter.job import Progress
from converter.models import (
    fetch_model,
    repository_of,
    task_of,
    torch_device,
)
from converter.runtimes.exported import FILES
from converter.runtimes.network import find_exported
from converter.staging import check_place, put_back, staged
from converter.version import __version__
from converter.weights.headers import ITEM_SIZES
from converter.weights.tensorfiles import find_weights, open_tensors
from reference_model.config import EomtDinov3Config

if TYPE_CHECKING:
    import torch

    from converter.checks.exported import ExportedModel
    from reference_model import EomtDinov3ForUniversalSegmentation

# the packages that decide the bytes of an export, by format
_PACKAGES: Mapping[Format, tuple[str, ...]] = {
    "onnx": ("torch", "onnx", "onnx-ir", "onnxscript"),
    "torch": ("torch",),
}

# room for the graph and the files beside the weights, in bytes
_SMALL_FILES = 1 << 24


@dataclass(frozen=True)
class Export:
    """A model that was exported.

    Attributes:
        model: a folder or a repository.
        output: the folder that was written; None if none was.
        export: how it was exported, as conversion.json has it.
        files: size in bytes and SHA-256 of every file in it.
        verdict: whether it computes what it should, and what that is based on.
    """

    model: str
    output: Path | None
    export: PastExport
    files: Digests
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """The export as JSON shows it."""
        return {
            "model": self.model,
            "output": str(self.output) if self.output else None,
            "export": {
                key: value
                for key, value in self.export.to_dict().items()
                if key not in ("files", "verdict")
            },
            "files": digests_to_dict(self.files),
            **self.verdict.to_dict(),
        }


def export(
    model: str | Path,
    output: str | Path,
    *,
    format: Format = "onnx",
    image_size: int | tuple[int, int] | None = None,
    dtype: ExportDtype = "float32",
    layers: bool = False,
    opset: int | None = None,
    recorded: str | Path | None = None,
    verify: bool = True,
    keep_unverified: bool = False,
    force: bool = False,
    report: str | Path | None = None,
    threads: int | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress = lambda *_: None,
) -> Export:
    """Exports a model to run elsewhere, and checks what the export computes.

    ``converter.export("model", "export")`` writes export/model.onnx, with the model's configuration
    files, its conversion.json with the part ``export``, and verdict.html.

    Args:
        model: its folder, or a Hub repository as owner/name or owner/name@revision.
        output: the folder to write.
        format: ``onnx``, or ``torch`` for a program that torch.export.load reads.
        image_size: fixes the input's size in pixels, one number or (height, width); by default the
            file takes all multiples of the patch size. The batch may have any size.
        dtype: of weights and computation; inputs and outputs are float32.
        layers: whether every layer's tokens are outputs, too.
        opset: version of ONNX's operators.
        recorded: recorded outputs to compare the export with; by default those in the model's
            folder, or those of the catalogue's entry that conversion.json names. Without any, or if
            they were recorded at another size than a fixed one, it is compared with the reference
            model, on random pixels.
        verify: whether to compare it.
        keep_unverified: whether to keep an export that fails, as ``<output>.unverified``.
        force: whether to replace an output that exists: the files that its conversion.json lists,
            and nothing else.
        report: an HTML file to write that shows what was found, like the output's verdict.html.
        threads: number of torch's CPU threads; by default torch's choice.
        token: for the Hub, as everywhere in huggingface_hub; by default HF_TOKEN or the login.
        cache_dir: where downloads are kept; by default the Hub's cache.
        local_files_only: whether to use only that cache.
        progress: called with a stage, and 0 or 1, and 1: when it begins, and when it is done.

    Raises:
        UsageError: an option is unknown or not possible.
        UnreadableFileError: the model or the recording cannot be read, or the model was changed
            since its conversion.
        OutputError: the output exists, or cannot be written.
        OutputsDifferError: the export does not compute what it should; ``conversion`` has the
            details.
        EomtConvertError: packages of the extra ``export`` are missing; masked attention is on; or
            float16 overflows.
        AccessError, HubUnavailableError: the repository cannot be reached.
    """
    for name, value, known in (
        ("format", format, get_args(Format)),
        ("dtype", dtype, get_args(ExportDtype)),
    ):
        if value not in known:
            raise UsageError(f"{name} is {value!r}, expected one of {', '.join(known)}.")
    if format == "onnx":
        from converter.exporting.onnx_writing import OPSET, check_opset

        import_module("converter.runtimes.onnx_file")  # runs the export; a package may be missing
        opset = OPSET if opset is None else opset
        check_opset(opset)
    elif opset is not None:
        raise UsageError("Only ONNX has an opset.", "Leave out --opset.")
    place = real_path(user_path(output))
    rejected = rejected_place(place) if keep_unverified else None
    page = page_beside(place, report)
    if page:
        prepare_place(page)
    for each in filter(None, (place, rejected)):
        put_back(each)
        check_place(each, force=force, made=made_files)
    access = Access.of(token, cache_dir, local_files_only)
    folder = fetch_model(model, access)
    if real_path(folder) == place:
        raise UsageError(f"{place} is the model itself.", "Give another folder with --output.")
    if find_exported(folder):
        raise UsageError(f"{model} is an export already.", "Export the model that it was made of.")
    history = read_history(folder)
    if history:
        _check_unchanged(folder, history)
    checkpoint = history.checkpoint if history else find_named(repository_of(model))
    recording = recording_of(folder, checkpoint, recorded)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size

    config = EomtDinov3Config.from_dict(read_config(folder / "config.json"))
    check_image_size(size, config.patch_size)

    from converter.checks.exported import Checks, check_exported, read_exported_model
    from converter.checks.precision import full_float32
    from reference_model import EomtDinov3ForUniversalSegmentation

    with (
        torch_device("cpu", threads),
        staged(place, size=_size_of(folder, dtype), force=force, made=made_files) as stage,
    ):
        with _stage("Loading the model", progress):
            network = EomtDinov3ForUniversalSegmentation.from_pretrained(folder, dtype="float32")
        if dtype == "float16":
            with _stage("Looking for overflows", progress):
                _refuse_overflow(network, _inputs(network, folder, size) if verify else None)
                network = network.half()
        _write(network, stage.folder, size, layers, opset, progress)
        del network
        _write_configs(folder, stage.folder, size, dtype)
        exported = read_exported_model(stage.folder / FILES[format], source=folder)
        findings = Findings(unverified("Verification was switched off (--no-verify)."))
        if verify:
            checks = Checks(recording, task_of(model, folder))
            with (
                _stage("Checking what it computes", progress),
                full_float32(),  # torch.export cannot trace with it
            ):
                findings = check_exported(exported, checks)
        past = _past(exported, dtype, size, findings.verdict, stage.folder)
        write_history(stage.folder, history, past)
        pages = [*([stage.folder / REPORT] if verify else []), *([page] if page else [])]
        if pages:
            write_page(pages, place.name, stage.folder, findings)
        listed = [path for path in map(stage.folder.joinpath, (HISTORY, REPORT)) if path.exists()]
        files = {**past.files, **digests_of(listed)}
        done = Export(str(model), place, past, files, findings.verdict)
        if done.verdict.verdict == "failed":
            kept = keep_rejected(stage, place, rejected, "export", force=force)
            raise OutputsDifferError(
                f"The export is wrong: {done.verdict.reason}",
                kept,
                done.verdict,
                replace(done, output=rejected),
            )
        stage.publish()
    return done


@contextmanager
def _stage(name: str, progress: Progress) -> Iterator[None]:
    """Shows a stage of the export while it runs."""
    progress(name, 0, 1)
    yield
    progress(name, 1, 1)


def _check_unchanged(folder: Path, history: History) -> None:
    """Checks that a model is the one that its conversion.json describes.

    Raises:
        UnreadableFileError: a file was changed; the export would bear the history of other weights.
    """
    for name, digest in history.files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest.sha256:
            raise UnreadableFileError(
                f"{path} was changed since its conversion: its SHA-256 differs from {HISTORY}.",
                f"To export the model as it is now, delete {HISTORY}.",
            )


def _size_of(folder: Path, dtype: ExportDtype) -> int:
    with open_tensors(find_weights(folder)) as file:
        elements = sum(info.size for info in file.tensors.values())
    return elements * ITEM_SIZES[DTYPES[dtype]] + _SMALL_FILES


def _inputs(
    network: "EomtDinov3ForUniversalSegmentation", folder: Path, size: tuple[int, int] | None
) -> "torch.Tensor":
    """Random pixels as the network takes them, (1, channels, height, width)."""
    from converter.checks.exported_numbers import random_pixels
    from converter.checks.pixels import read_normalisation

    channels = network.config.num_channels
    pixels = random_pixels((1, channels, *(size or network.config.input_size)))
    return read_normalisation(folder / PREPROCESSOR, channels)(pixels)


def _refuse_overflow(
    network: "EomtDinov3ForUniversalSegmentation", inputs: "torch.Tensor | None"
) -> None:
    """Looks for values that float16 cannot hold: weights and, with inputs, what is computed.

    Raises:
        EomtConvertError: a weight or a layer overflows.
    """
    from converter.checks.diagnosis.overflow import find_large_weight, find_overflow

    found = find_large_weight(network) if inputs is None else find_overflow(network, inputs)
    if found:
        raise EomtConvertError(f"{found}.", "Leave out --dtype to export in float32.")


def _write(
    network: "EomtDinov3ForUniversalSegmentation",
    folder: Path,
    size: tuple[int, int] | None,
    layers: bool,
    opset: int | None,
    progress: Progress,
) -> None:
    """Writes the export's own files: as ONNX, or as a program if there is no opset."""
    from converter.exporting.tracing import trace

    with _stage("Tracing the network", progress):
        program = trace(network, image_size=size, layers=layers)
    with _stage("Writing the export", progress), writable(folder):
        if opset is None:
            from converter.exporting.torch_writing import write_torch

            write_torch(program, folder)
        else:
            from converter.exporting.onnx_writing import write_onnx

            write_onnx(program, network, folder, opset=opset)


def _write_configs(
    source: Path, folder: Path, size: tuple[int, int] | None, dtype: ExportDtype
) -> None:
    """Copies the model's configuration, with the export's image size and type."""
    config = read_json_object(source / "config.json")
    preprocessor = read_json_object(source / PREPROCESSOR)
    config["dtype"] = dtype
    config.pop("torch_dtype", None)  # the same, in older configurations
    if size:
        config["image_size"] = size[0] if size[0] == size[1] else list(size)
        task: Task = "semantic" if preprocessor.get("do_split_image") else "panoptic"
        preprocessor["size"] = preprocessor_config(task, size)["size"]
    write_json(folder / "config.json", config)
    write_json(folder / PREPROCESSOR, preprocessor)


def _past(
    exported: "ExportedModel",
    dtype: ExportDtype,
    size: tuple[int, int] | None,
    verdict: Verdict,
    folder: Path,
) -> PastExport:
    """What conversion.json says of the export; it depends on model, versions and options only."""
    file = exported.file
    return PastExport(
        version=__version__,
        format=file.format,
        opset=file.opset,
        dtype=dtype,
        image_size=size,
        versions={name: version(name) for name in _PACKAGES[file.format]},
        input=file.input.name,
        outputs=[port.name for port in file.outputs.values()],
        dynamic_axes={
            port.name: port.dynamic_axes for port in (file.input, *file.outputs.values())
        },
        files=digests_of(sorted(folder.iterdir())),
        tensors={name: tensor.sha256 for name, tensor in exported.tensors.items()},
        verdict=verdict.record(),
    )
