"""Finds exported models, and runs them like the reference model's network."""

from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import EomtConvertError, UsageError
from converter.runtimes.exported import EXTERNAL_DATA, FILES, Axis, ExportedFile, ExportedSession
from converter.runtimes.providers import providers_of, without_gpu
from converter.weights.tensorfiles import USUAL_NAMES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentationOutput


def find_exported(place: Path) -> Path | None:
    """The exported file that a path means: itself, or the one in a folder; None if there is none.

    A folder that also has weights is a converted model.
    """
    if place.suffix in {Path(name).suffix for name in FILES.values()} and not place.is_dir():
        return place
    if any((place / name).exists() for name in USUAL_NAMES):
        return None
    return next((place / name for name in FILES.values() if (place / name).exists()), None)


def read_exported(
    path: Path, *, input_name: str | None = None, output_names: tuple[str, str] | None = None
) -> ExportedFile:
    """Reads an exported file without running anything that it holds.

    Args:
        path: a file whose name ends in .onnx or .pt2.
        input_name: the name of an ONNX file's input; by default it is recognised.
        output_names: the names of an ONNX file's outputs for masks and classes, likewise.

    Raises:
        UnreadableFileError: it cannot be read, or is not an export of this kind of model.
        UsageError: it has no input or output of the given name.
    """
    if path.suffix == Path(FILES["onnx"]).suffix:
        from converter.runtimes.onnx_file import read_onnx

        return read_onnx(path, input_name=input_name, output_names=output_names)
    if input_name or output_names:
        raise UsageError("Only inputs and outputs of ONNX files have names.")
    from converter.runtimes.torch_program import read_program

    return read_program(path)


class ExportedNetwork:
    """An exported file, which is called like the reference model's network in evaluation mode.

    Attributes:
        config: of the model that was exported.
        device, dtype: of inputs and outputs; where the file runs is up to its session.
    """

    def __init__(
        self, file: ExportedFile, session: ExportedSession, config: "EomtDinov3Config"
    ) -> None:
        import torch

        self.config = config
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._batch = file.input.axes[0]
        self._session = session

    def __call__(
        self,
        pixel_values: "Tensor",
        patch_offsets: "list[Tensor] | None" = None,
        output_hidden_states: bool = False,
    ) -> "EomtDinov3ForUniversalSegmentationOutput":
        """Masks and classes of every query.

        Args:
            pixel_values: (batch, channels, height, width), rescaled and normalised.
            patch_offsets: windows of the pictures, passed on to the output.
            output_hidden_states: also return every layer's tokens, if the session computes them.

        Raises:
            EomtConvertError: the runtime fails, or the file does not take inputs of this size.
        """
        import torch

        from reference_model import EomtDinov3ForUniversalSegmentationOutput

        outputs = {
            name: torch.from_numpy(values)
            for name, values in run_in_batches(self._session, pixel_values, self._batch).items()
        }
        layers = [name for name in outputs if name.startswith("hidden_states.")]
        states = [outputs[name] for name in ("patch_embeddings", *layers) if name in outputs]
        return EomtDinov3ForUniversalSegmentationOutput(
            outputs["mask_logits"],
            outputs["class_logits"],
            outputs.get("last_hidden_state", torch.empty(0)),
            patch_offsets,
            tuple(states) if output_hidden_states and layers else None,
        )


def run_in_batches(
    session: ExportedSession, pixel_values: "Tensor", batch: Axis
) -> "dict[str, NDArray[np.float32]]":
    """An exported file's outputs, also where it does not take batches of any size.

    Args:
        session: the file, ready to run.
        pixel_values: (batch, channels, height, width), rescaled and normalised.
        batch: the batch sizes that it takes. The last input is repeated to fill a batch.
    """
    import numpy as np

    inputs = pixel_values.float().contiguous().numpy(force=True)
    size = batch.nearest(len(inputs))
    if size is None or size == len(inputs):
        return session.run(inputs)
    filling = -len(inputs) % size
    padded = np.concatenate([inputs, *[inputs[-1:]] * filling])
    parts = [session.run(padded[i : i + size]) for i in range(0, len(padded), size)]
    return {
        name: np.concatenate([part[name] for part in parts])[: len(inputs)] for name in parts[0]
    }


def exported_files(file: ExportedFile) -> dict[str, Path]:
    """The files that an exported file consists of: itself, and those that hold its tensors.

    Their names are those that eomt-convert gives them, whatever they are called. Further files with
    tensors are numbered, in the order in which the file uses them.
    """
    found = {FILES[file.format]: file.path}
    if file.format == "onnx":
        from converter.runtimes.onnx_file import ExternalTensor

        tensors = file.tensors.values()
        paths = [each.path for each in tensors if isinstance(each, ExternalTensor)]
        for number, path in enumerate(dict.fromkeys(paths)):
            found[f"{EXTERNAL_DATA}.{number}" if number else EXTERNAL_DATA] = path
    return found


def check_device(file: ExportedFile, device: str) -> None:
    """Checks that an exported file can run on a device.

    Raises:
        UsageError: it cannot.
    """
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and file.format == "torch"):
        raise UsageError(f"{file.path.name} cannot run on {device!r}.", "Leave out --device.")


def open_exported(
    path: Path, folder: Path, device: str, dtype: str = "auto", *, layers: bool = False
) -> ExportedNetwork:
    """Opens an exported file on a device: the CPU or, for ONNX, a GPU with CUDA.

    Args:
        path: the file.
        folder: the folder with its config.json.
        device: as torch names it.
        dtype: ``auto`` or ``float32``: that of inputs and outputs.
        layers: whether to compute every layer's output, where the file shows them.

    Raises:
        UsageError: it cannot run on this device or in this dtype.
        UnreadableFileError: it cannot be read.
        EomtConvertError: onnxruntime cannot load what runs it on the GPU.
    """
    from reference_model import EomtDinov3Config

    if dtype not in ("auto", "float32"):
        raise UsageError(
            f"{path.name} takes float32 and computes in the type that it was exported in.",
            "Leave out --dtype. To compute in another type, export the model with --dtype.",
        )
    file = read_exported(path)
    check_device(file, device)
    config = EomtDinov3Config.from_pretrained(folder)
    providers = providers_of(device)
    session = file.open(providers, config.num_hidden_layers if layers else 0)
    if providers and without_gpu(providers[0]) not in session.providers():
        raise EomtConvertError(
            f"onnxruntime has {without_gpu(providers[0])}, but cannot load it for {device!r}: "
            f"{path.name} would run on the CPU.",
            "Install the versions of CUDA and cuDNN that this onnxruntime needs, or leave out "
            "--device.",
        )
    return ExportedNetwork(file, session, config)
