"""Opens converted models, from a folder or a Hub repository, so that they can be run."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from converter.catalog import find_named
from converter.configs import PREPROCESSOR, Dtype, read_config
from converter.errors import EomtConvertError, UnreadableFileError, UsageError
from converter.files import read_json_object, user_path
from converter.history import HISTORY, read_history
from converter.hub.access import Access
from converter.hub.downloads import not_in_cache
from converter.hub.sources import fetch, fetch_first
from converter.places import HubSource, LocalSource, parse_source
from converter.runtimes.network import ExportedNetwork, find_exported, open_exported

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reference_model import (
        BatchFeature,
        EomtDinov3Config,
        EomtDinov3ForUniversalSegmentation,
        EomtDinov3ForUniversalSegmentationOutput,
        EomtImageProcessor,
    )

    # what segments pictures: its attributes config, device and dtype, and calling it, are the same
    Network = EomtDinov3ForUniversalSegmentation | ExportedNetwork

# modes of torch.compile
Compile = Literal["default", "max-autotune"]


def fetch_model(model: str | Path, access: Access) -> Path:
    """The folder of a converted model, downloaded if it is a repository.

    Args:
        model: the folder, or a Hub repository as owner/name or owner/name@revision.
        access: how the Hub is reached.

    Raises:
        UnreadableFileError: it is not a converted model, or a file arrived damaged twice.
        AccessError, HubUnavailableError: the repository cannot be reached.
    """
    source = _source(model)
    if isinstance(source, LocalSource):
        if not source.path.is_dir():
            raise UnreadableFileError(f"There is no folder {source.path}.")
        is_model = (source.path / PREPROCESSOR).is_file()
    else:  # checked before gigabytes are fetched
        is_model = fetch_first(source, (PREPROCESSOR,), access) is not None
        if access.offline and not is_model:
            reason = f"{PREPROCESSOR} is missing"
            raise not_in_cache(source.repo_id, source.revision, reason)
    if not is_model:
        raise UnreadableFileError(
            f"{model} has no {PREPROCESSOR}: it is not a converted model.",
            "eomt-convert makes a model from a delta and a backbone.",
        )
    if isinstance(source, LocalSource):
        folder = source.path
    else:
        folder = fetch(source, access, beside=(PREPROCESSOR, HISTORY)).weights.parent
    read_config(folder / "config.json")
    read_json_object(folder / PREPROCESSOR)
    return folder


def repository_of(model: str | Path) -> str | None:
    """The repository of a model; None if the model is a folder."""
    source = _source(model)
    return source.repo_id if isinstance(source, HubSource) else None


def _source(model: str | Path) -> LocalSource | HubSource:
    if isinstance(model, Path) or model.count("/") != 1:
        return LocalSource(user_path(model))
    return parse_source(model)


def find_task(model: str | Path, folder: Path) -> str:
    """A model's task: panoptic, instance or semantic.

    It is taken from the model's conversion.json, or else from the catalogue's entry with the
    repository's name. Otherwise a model with sliding windows is semantic, and one with stuff
    classes is panoptic.

    Args:
        model: its folder or repository, as the user named it.
        folder: where its files are.

    Raises:
        UnreadableFileError: one of its files cannot be read.
        UsageError: nothing shows the task.
    """
    history = read_history(folder)
    if history and history.task:
        return history.task
    if checkpoint := find_named(str(model).partition("@")[0]):
        return checkpoint.task
    if read_json_object(folder / PREPROCESSOR).get("do_split_image"):
        return "semantic"
    if read_json_object(folder / "config.json").get("stuff_classes"):
        return "panoptic"
    raise UsageError(
        f"Nothing in {model} shows its task.",
        "Give --task panoptic, --task instance or --task semantic.",
    )


def task_of(model: str | Path, folder: Path) -> str | None:
    """The same as `find_task`; None if nothing shows the task."""
    try:
        return find_task(model, folder)
    except UsageError:
        return None


def build_model(
    config: "EomtDinov3Config", weights: "Mapping[str, Tensor]"
) -> "EomtDinov3ForUniversalSegmentation":
    """A model that computes in float32 on the CPU, and shares the memory of its weights.

    Args:
        config: its configuration.
        weights: all of its tensors by name, in float32.
    """
    import torch

    from reference_model import EomtDinov3ForUniversalSegmentation

    with torch.device("meta"):
        model = EomtDinov3ForUniversalSegmentation(config)
    model.load_state_dict(dict(weights), assign=True)
    return model.eval()


def load_model(
    folder: Path,
    *,
    device: str,
    dtype: str = "auto",
    windows: bool,
    compile: Compile | None = None,
) -> "tuple[Network, EomtImageProcessor]":
    """Loads the network and its image processor, which is set to do what the original does.

    Args:
        folder: the folder of a converted or an exported model.
        device: where the network runs, as torch names it.
        dtype: of its weights, as torch names it, or ``auto`` for the one in the file, which is the
            only one for an exported model.
        windows: whether windows slide over pictures, as for semantic segmentation; otherwise
            pictures are padded. This overrides the published preprocessor_config.json of semantic
            models, which pads.
        compile: the mode of torch.compile; None to run the network as it is.

    Raises:
        UnreadableFileError: a file is missing or broken, or network and image processor are for
            different sizes.
        UsageError: there is no such mode, or an exported model cannot run in this way.
    """
    check_mode(compile)
    exported = find_exported(folder)
    if exported and compile:
        raise UsageError(
            f"{folder} is an export, which torch cannot compile.", "Leave out --compile."
        )
    from safetensors import SafetensorError

    from reference_model import EomtDinov3ForUniversalSegmentation, EomtImageProcessor

    network: Network
    try:
        if exported:
            network = open_exported(exported, folder, device, dtype)
        else:
            network = model = EomtDinov3ForUniversalSegmentation.from_pretrained(
                folder, device=device, dtype=dtype
            )
            if compile:
                compile_network(model, compile)
        processor = EomtImageProcessor.from_pretrained(
            folder, do_resize=True, do_split_image=windows, do_pad=not windows
        )
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UnreadableFileError(f"The model in {folder} cannot be loaded: {error}") from error
    trained, made = network.config.input_size, processor.image_size
    if mismatch := size_mismatch(trained, made, folder / "config.json"):
        raise UnreadableFileError(
            mismatch,
            "Set both to the height and width in pixels that the model was trained with.",
        )
    if network.config.num_channels != 3:
        raise UnreadableFileError(
            f"num_channels in {folder / 'config.json'} is {network.config.num_channels}, expected "
            "3 for pictures."
        )
    return network, processor


def check_mode(compile: str | None) -> None:
    """Checks that a mode of torch.compile is known.

    Raises:
        UsageError: it is not.
    """
    if compile is not None and compile not in get_args(Compile):
        raise UsageError(
            f"The mode of torch.compile is {compile!r}, expected one of "
            f"{', '.join(get_args(Compile))}."
        )


def in_dtype(
    network: "EomtDinov3ForUniversalSegmentation", dtype: Dtype
) -> "EomtDinov3ForUniversalSegmentation":
    """Another network with the same weights in a dtype; tensors that have it already are shared."""
    import torch

    state = {
        name: tensor.to(getattr(torch, dtype)) for name, tensor in network.state_dict().items()
    }
    with torch.device("meta"):
        other = type(network)(network.config)
    other.load_state_dict(state, assign=True)
    return other.eval()


def compile_network(network: "EomtDinov3ForUniversalSegmentation", mode: Compile) -> None:
    """Has a network compiled as one graph when it is run; see `compiler_errors`.

    The first batch decides the sizes. A batch of another size is compiled once more, for any number
    of pictures, and a single picture once by itself.
    """
    network.compile(fullgraph=True, mode=mode)


def run_network(
    network: "Network", inputs: "BatchFeature"
) -> "EomtDinov3ForUniversalSegmentationOutput":
    """Runs a network on what its image processor made of pictures.

    The positions of windows, of which there are more or fewer for every picture, stay out of a
    compiled graph.

    Raises:
        EomtConvertError: the network cannot be compiled.
    """
    with compiler_errors():
        outputs: EomtDinov3ForUniversalSegmentationOutput = network(inputs["pixel_values"])
    return replace(outputs, patch_offsets=inputs.get("patch_offsets"))


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Makes errors of torch.compile in this block into a clear one.

    Raises:
        EomtConvertError: torch.compile fails.
    """
    try:
        yield
    except RuntimeError as error:
        dynamo: Any = sys.modules.get("torch._dynamo.exc")  # not imported unless it was used
        if dynamo is None or not isinstance(error, dynamo.TorchDynamoException):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = next(
            (line for line in lines if not line.endswith("raised:")), "no reason is given"
        )
        raise EomtConvertError(
            f"torch.compile cannot compile the model: {reason.rstrip('.')}.",
            "It needs a C++ compiler, such as g++, and on GPUs Triton. Leave out --compile to run "
            "without it.",
        ) from error


def size_mismatch(
    trained: tuple[int, int], made: tuple[int, int], config: str | Path = "config.json"
) -> str:
    """A sentence if a model and its image processor are for different sizes; empty otherwise.

    Args:
        trained: (height, width) in pixels that the network expects.
        made: (height, width) in pixels of the image processor's output.
        config: the name of the file with ``trained``, for the sentence.
    """
    if made == trained:
        return ""
    return (
        f"image_size in {config} is {list(trained)}, {PREPROCESSOR} makes pictures of {list(made)}."
    )


def choose_device(name: str | None) -> "torch.device":
    """The device with a name; if it is a GPU, it becomes torch's current device.

    A GPU without a number is the one that torchrun assigns to this process.

    Args:
        name: as torch names it; None for a GPU if there is one, else the CPU.

    Raises:
        UsageError: the device cannot be used.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"The device {name!r} cannot be used: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def torch_device(name: str | None, threads: int | None) -> Iterator[str]:
    """Checks that a device can be used, and sets torch's number of CPU threads in this block.

    Args:
        name: as torch names it; None for a GPU if there is one, else the CPU.
        threads: number of CPU threads; None for torch's own choice.

    Yields:
        The device's name.

    Raises:
        UsageError: the device cannot be used.
    """
    import torch

    device = choose_device(name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield str(device)
    finally:
        torch.set_num_threads(before)
