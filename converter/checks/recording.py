"""Records what a model computes, so that a later version can be compared with it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checks.pixels import open_picture, read_normalisation
from converter.checks.recorded import IMAGES, PROVENANCE_FILE
from converter.checks.verdict import LEVELS, NUMBERED, Verdict
from converter.checks.verification import verify
from converter.configs import CONFIGS, DTYPES, PREPROCESSOR, coarsest
from converter.errors import (
    EomtConvertError,
    OutputsDifferError,
    UnreadableFileError,
    UsageError,
)
from converter.files import read_json_object, real_path, sha256, user_path, write_json
from converter.history import read_history
from converter.hub.access import Access
from converter.models import (
    fetch_model,
    repository_of,
    task_of,
    torch_device,
)
from converter.places import RECORDED
from converter.runtimes.network import (
    ExportedNetwork,
    check_device,
    exported_files,
    find_exported,
    open_exported,
)
from converter.runtimes.providers import providers_of
from converter.staging import check_place, staged
from converter.version import TOOL, __version__
from converter.weights.tensorfiles import is_model_file
from converter.weights.writing import SafetensorsWriter, TensorSpecs

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from converter.checks.exported import ExportedModel
    from converter.checks.pipeline import Prepared
    from converter.models import Network
    from reference_model import EomtDinov3ForUniversalSegmentation, EomtImageProcessor

# the levels that a model must not fail for its outputs to be worth recording
_CHECKED = LEVELS[: LEVELS.index("pictures") + 1]

_LOGITS = ("mask_logits", "class_logits")

# safetensors' names of the recorded dtypes, by numpy's
_DTYPES = {"float32": "F32", "uint8": "U8", "int16": "I16", "int64": "I64"}


@dataclass(frozen=True)
class Recording:
    """A recorded folder.

    Attributes:
        folder: where it is.
        tensors: dtype (as safetensors names it) and shape of every recorded tensor, by name.
        size: size of its recorded.safetensors in bytes.
        sha256: digest of that file.
        verdict: the verdict on the model when it was recorded.
    """

    folder: Path
    tensors: TensorSpecs
    size: int
    sha256: str
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """The recording as JSON shows it."""
        return {
            "folder": str(self.folder),
            "tensors": {
                name: {"dtype": dtype, "shape": list(shape)}
                for name, (dtype, shape) in self.tensors.items()
            },
            "size": self.size,
            "sha256": self.sha256,
            **self.verdict.to_dict(),
        }


def record(
    model: str | Path,
    output: str | Path,
    *,
    images: Sequence[str | Path] = (),
    random: int | None = None,
    seed: int = 0,
    layers: bool = False,
    image_size: tuple[int, int] | None = None,
    force: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Recording:
    """Writes a folder with an input and what a model computes from it.

    That is in float32 or, for an exported model, in the type in which the file computes.

    The same model, input, machine and number of threads give the same bytes. The whole input goes
    through the model as one batch, as it does when a model is compared with the recording.

    Args:
        model: its folder, or a Hub repository as owner/name or owner/name@revision.
        output: the folder to write: recorded.safetensors; recorded.json, which says from what and
            how it was made; and the pictures.
        images: pictures, resized and padded or cut into windows by the model's image processor.
            They are kept as PNG without metadata; so are their segments, if the model's task is
            known.
        random: number of inputs with random pixels, instead of pictures.
        seed: seed of the random pixels.
        layers: also record every layer's output for the first input and, of a model that is not
            exported, every block's predictions with masked attention.
        image_size: (height, width) of the input in pixels; by default the model's. A smaller one
            makes a smaller recording, without segments.
        force: replace an existing recording: the files that its recorded.json names, and nothing
            else.
        device: where the model runs, such as ``cuda``; for an ONNX file, by onnxruntime.
        threads: number of torch's CPU threads; by default torch's choice.
        token: for the Hub, as everywhere in huggingface_hub; by default HF_TOKEN or the login.
        cache_dir: where downloads are kept; by default the Hub's cache.
        local_files_only: whether only that cache is used.

    Raises:
        OutputsDifferError: the model fails verification.
        EomtConvertError: its masked attention is on, or an output is NaN or infinite.
        UnreadableFileError: the model or a picture cannot be read.
        OutputError: the output exists or cannot be written.
        AccessError: the repository is missing, gated, or not in the cache.
        HubUnavailableError: the Hub is down, out of reach, or asks to wait.
        UsageError: neither or both of pictures and random inputs were given, the image size does
            not fit the model, or there is no such device.
    """
    if bool(images) == bool(random):
        raise UsageError(
            "A recording needs either pictures or random pixels.", "Give --image or --random."
        )
    place = real_path(user_path(output))
    check_place(place, force=force, made=made_files)
    access = Access.of(token, cache_dir, local_files_only)
    folder, repo_id = fetch_model(model, access), repository_of(model)
    exported = _read_exported(folder, device)
    # what runs an exported file on the GPU is not torch
    torch_runs_on = "cpu" if exported else device
    verdict = verify(
        folder,
        level=NUMBERED.index("peers") + 1,
        device=torch_runs_on,
        providers=providers_of(device) if exported else (),
        threads=threads,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if verdict.verdict == "failed":
        raise OutputsDifferError(
            f"{model} fails verification, so its outputs are not recorded.",
            "Convert it again, or record another model.",
            verdict,
        )
    from converter.checks.precision import full_float32

    files = [user_path(image) for image in images]
    pictures = [open_picture(file) for file in files]
    task = task_of(model, folder)
    with torch_device(torch_runs_on, threads), full_float32():
        network = _load(folder, device)
        if random:
            pixels = _random_pixels(network, random, seed, image_size)
        else:
            processor = _load_processor(folder)
            inputs = _prepare(processor, pictures, image_size)
            pixels = inputs.pixels
        values = read_normalisation(folder / PREPROCESSOR, pixels.shape[1])(pixels)
        tensors = {**_compute(network, values, layers=layers), "pixels": pixels}
        if random or image_size not in (None, processor.image_size):
            pictures = []  # the recorded inputs are not what these pictures become by default
        else:
            tensors |= _segment(processor, task, tensors, inputs)
        description = {
            "model": _describe(folder, repo_id, verdict, exported),
            "task": task,
            "stuff_classes": list(_load_processor(folder).stuff_classes or ()),
            "input": {"random": random, "seed": seed}
            if random
            else {"images": _digests((path.name, path) for path in files)},
            "provenance": _provenance(device, exported),
        }
    return _write(place, tensors, pictures, description, verdict, force=force)


def made_files(folder: Path) -> Mapping[str, str | None]:
    """Names and SHA-256 of the files that `record` has written, by its recorded.json."""
    try:
        content = read_json_object(folder / PROVENANCE_FILE)
    except UnreadableFileError:
        return {}
    provenance, digests = content.get("provenance"), content.get("sha256")
    if not (isinstance(provenance, dict) and isinstance(digests, dict)):
        return {}
    if not str(provenance.get("implementation")).startswith(f"{TOOL} "):
        return {}  # made with the original implementation, which is hard to record again
    pictures = re.compile(rf"{IMAGES}/\d+\.png")
    ours = {n: digest for n, digest in digests.items() if n == RECORDED or pictures.fullmatch(n)}
    return {**ours, PROVENANCE_FILE: None}


def _read_exported(folder: Path, device: str) -> "ExportedModel | None":
    """The exported model in a folder; None if the model there is not exported.

    Raises:
        UsageError: it cannot run on this device.
    """
    path = find_exported(folder)
    if path is None:
        return None
    from converter.checks.exported import read_exported_model

    exported = read_exported_model(path)
    check_device(exported.file, device)
    return exported


def _load(folder: Path, device: str) -> "Network":
    """The model in float32, or an exported one with its layers' outputs.

    Raises:
        EomtConvertError: its masked attention is on.
    """
    import torch

    from reference_model import EomtDinov3ForUniversalSegmentation

    if exported := find_exported(folder):
        return open_exported(exported, folder, device, layers=True)
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(
        folder, device=device, dtype=torch.float32
    )
    if model.attn_mask_probs.any():
        raise EomtConvertError(
            f"Masked attention is on in {folder}: attn_mask_probs is "
            f"{model.attn_mask_probs.tolist()}.",
            "Masked attention is for training; a converted model has zeros there. Convert again.",
        )
    return model


# the input --------------------------------------------------------------------------------------


def _load_processor(folder: Path) -> "EomtImageProcessor":
    from reference_model import EomtImageProcessor

    try:
        return EomtImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"{folder} has no usable image processor: {error}") from error


def _prepare(
    processor: "EomtImageProcessor",
    pictures: "Sequence[Image]",
    image_size: tuple[int, int] | None,
) -> "Prepared":
    """Pictures, prepared by a model's image processor."""
    from converter.checks.pipeline import prepare

    if image_size:
        size = dict(zip(("height", "width"), image_size, strict=True))
        processor = replace(processor, size=size)
    try:
        return prepare(processor, pictures)
    except ValueError as error:
        raise UnreadableFileError(f"The pictures cannot be used: {error}") from error


def _random_pixels(
    model: "Network",
    count: int,
    seed: int,
    image_size: tuple[int, int] | None,
) -> "Tensor":
    """Uniformly random pixels, (count, channels, height, width) uint8."""
    import numpy as np
    import torch

    height, width = image_size or model.config.input_size
    shape = (count, model.config.num_channels, height, width)
    return torch.from_numpy(np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8))


# the outputs ------------------------------------------------------------------------------------


def _compute(model: "Network", inputs: "Tensor", *, layers: bool) -> "dict[str, Tensor]":
    """Computes the outputs to record, in the network's order.

    Raises:
        UsageError: height or width of the inputs is not a multiple of the patch size.
        EomtConvertError: an output is NaN or infinite.
    """
    import torch

    from converter.checks.numbers import masked_predictions, run

    try:
        outputs = run(model, inputs)
    except ValueError as error:
        raise UsageError(f"The model cannot run on inputs of this size: {error}.") from error
    if layers:
        # hidden states are large, and those of one picture show where a difference begins
        outputs = {
            name: output if name in _LOGITS else output[:1] for name, output in outputs.items()
        }
        if not isinstance(model, ExportedNetwork):
            outputs = _rope(model, inputs) | outputs | masked_predictions(model, inputs)
    else:
        outputs = {name: outputs[name] for name in _LOGITS}
    for name, output in outputs.items():
        if not torch.isfinite(output).all():
            raise EomtConvertError(f"The model's output {name} holds NaN or infinity.")
    return outputs


def _segment(
    processor: "EomtImageProcessor",
    task: str | None,
    outputs: "Mapping[str, Tensor]",
    inputs: "Prepared",
) -> "dict[str, Tensor]":
    """What is recorded of pictures: inputs, logits and, if the task is known, results."""
    import torch

    from converter.checks.pipeline import segment

    logits = {f"pipeline.{name}": outputs[name] for name in _LOGITS}
    results = segment(processor, task, logits, inputs) if task else {}
    return {
        **inputs.named(),
        **logits,
        # ids are small numbers, and the maps are as large as the pictures
        **{n: r.to(torch.int16) if r.ndim > 1 else r for n, r in results.items()},
    }


def _rope(model: "EomtDinov3ForUniversalSegmentation", inputs: "Tensor") -> "dict[str, Tensor]":
    """Cosine and sine of the rotary positions, each (patches, head size)."""
    from reference_model.backbone import patch_grid

    grid = patch_grid(inputs, model.config.patch_size)
    cos, sin = model.rope_embeddings(grid, inputs.dtype, model.device)
    return {"rope.cos": cos.cpu(), "rope.sin": sin.cpu()}


# the folder -------------------------------------------------------------------------------------


def _provenance(device: str, exported: "ExportedModel | None") -> dict[str, Any]:
    """Versions, device and settings that the last bits of the outputs depend on.

    Args:
        device: as torch names it.
        exported: the exported model, if the outputs are those of one.
    """
    import numpy as np
    import PIL
    import torch
    from torch.backends import cuda

    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    found: dict[str, Any] = {
        "implementation": f"{TOOL} {__version__}, reference model",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "dtype": "float32",
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if exported:
        runtime = {"onnx": "onnxruntime", "torch": "torch"}[exported.file.format]
        version: str = import_module(runtime).__version__
        dtype = exported.dtype
        found["implementation"] = f"{TOOL} {__version__}, {runtime} {version}"
        found["dtype"] = dtype
        found["recorded_by"] = {"runtime": runtime, "version": version, "dtype": dtype}
        if exported.file.format == "onnx":
            return found  # torch's settings do not matter
    kernels = {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }
    return {
        **found,
        "threads": torch.get_num_threads(),
        "attention": "torch.nn.functional.scaled_dot_product_attention",
        "attention_kernels": [name for name, enabled in kernels.items() if enabled],
    }


def _describe(
    folder: Path, repo_id: str | None, verdict: Verdict, exported: "ExportedModel | None"
) -> dict[str, Any]:
    """Which model was recorded, and the result of its verification."""
    history = read_history(folder)
    dtypes = verdict.levels[0].figures["dtypes"]
    types = [name for name, short in DTYPES.items() if short in dtypes]
    files = {name: folder / name for name in CONFIGS}
    if exported:
        types += _rounded_to(exported)
        files |= exported_files(exported.file)
    else:
        weights = sorted(path.name for path in folder.iterdir() if is_model_file(path.name))
        files |= {name: folder / name for name in weights}
    return {
        "repo": repo_id,
        "checkpoint": history.checkpoint.name if history and history.checkpoint else None,
        "dtypes": dtypes,
        "rounded_to": coarsest(types),
        "verified": {level.level: level.status for level in verdict.levels[: len(_CHECKED)]},
        "verdict": verdict.verdict,
        "basis": verdict.basis,
        "tensors": verdict.levels[0].figures["digests"],
        "files": _digests(files.items()),
    }


def _rounded_to(exported: "ExportedModel") -> list[str]:
    """The 16-bit types that tensors in an exported file had been rounded to, of any type now."""
    import numpy as np
    import torch

    from converter.checks.diagnosis.by_value import is_coarse

    values = (tensor.read().astype(np.float32) for tensor in exported.tensors.values())
    found = (is_coarse(torch.from_numpy(np.ascontiguousarray(each))) for each in values)
    return [dtype for dtype in found if dtype]


def _digests(files: Iterable[tuple[str, Path]]) -> list[dict[str, str]]:
    """Names and SHA-256 of files."""
    return [{"name": name, "sha256": sha256(path)} for name, path in files]


def _write(
    place: Path,
    tensors: "Mapping[str, Tensor]",
    pictures: "Sequence[Image]",
    description: Mapping[str, Any],
    verdict: Verdict,
    *,
    force: bool,
) -> Recording:
    arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    specs = {name: (_DTYPES[array.dtype.name], array.shape) for name, array in arrays.items()}
    size = sum(array.nbytes for array in arrays.values())
    size += sum(3 * picture.width * picture.height for picture in pictures)
    with staged(place, size=size, force=force, made=made_files, last=RECORDED) as stage:
        with SafetensorsWriter(stage.folder / RECORDED, specs) as file:
            for array in arrays.values():
                file.write(array)
        recording = Recording(place, specs, file.size, file.sha256(), verdict)
        digests = {RECORDED: recording.sha256}
        if pictures:
            (stage.folder / IMAGES).mkdir()
        for index, picture in enumerate(pictures):
            path = stage.folder / IMAGES / f"{index}.png"
            picture.save(path, "PNG")
            digests[f"{IMAGES}/{path.name}"] = sha256(path)
        write_json(stage.folder / PROVENANCE_FILE, {**description, "sha256": digests})
        stage.publish()
    return recording
