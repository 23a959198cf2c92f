"""Other implementations of the network, run on the same input and compared layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converter.checks.comparison import Comparison, Tolerance, compare, largest_difference
from converter.checks.numbers import Numbers, run
from converter.checks.pixels import Normalisation
from converter.checks.verdict import Level
from converter.errors import UsageError

if TYPE_CHECKING:
    from reference_model import EomtDinov3ForUniversalSegmentation


def check_transformers(
    folder: Path,
    model: "EomtDinov3ForUniversalSegmentation",
    normalisation: Normalisation,
    pixels: Tensor | None,
    numbers: Numbers | None,
) -> Level:
    """Compares the reference model with the installed transformers' model.

    Where they differ, the recorded original decides which of the two is wrong.

    Args:
        folder: of the model.
        model: the reference model, on any device.
        normalisation: of its preprocessor_config.json.
        pixels: the recorded input, (batch, channels, height, width) uint8; None for random ones.
        numbers: the reference model's result on the recorded input, if it was run on it.

    Raises:
        UsageError: transformers is not installed, or lacks SciPy.
    """
    for package in ("transformers", "scipy"):
        if find_spec(package) is None:
            raise UsageError(
                f"--against transformers needs {package}, which is not installed.",
                "pip install transformers scipy",
            )
    name = f"transformers {version('transformers')}"
    height, width = model.config.input_size
    if pixels is None:
        generator = torch.Generator().manual_seed(0)
        shape = (1, model.config.num_channels, height, width)
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    if not height == width == pixels.shape[-2] == pixels.shape[-1]:
        reason = f"{name} builds models for square pictures of one size only."
        return Level("peers", "not checked", reason)

    inputs = normalisation(pixels)
    ours = dict(numbers.outputs) if numbers else run(model, inputs)
    peer = _load(folder).to(model.device)
    compared = _compare(ours, _run_layer_by_layer(peer, inputs))
    figures: dict[str, Any] = {
        "peer": "transformers",
        "version": version("transformers"),
        "tolerance": Tolerance().absolute,
        "relative_tolerance": Tolerance().relative,
        "max_abs": largest_difference(compared),
        "compared": {name: comparison.to_dict() for name, comparison in compared.items()},
    }
    differing = [name for name, comparison in compared.items() if comparison.failure]
    if not differing:
        return Level("peers", "passed", figures=figures)
    first = compared[differing[0]].failure.rstrip(".")
    with _gelu_in_the_heads(peer):
        mended = _compare(ours, _run_layer_by_layer(peer, inputs))
    if not any(comparison.failure for comparison in mended.values()):
        reason = (
            f"{name} is wrong here, by up to {compared[differing[0]].max_abs:.3g} in "
            f"{differing[0]}: it applies {model.config.hidden_act} in the mask head and in "
            "upscaling, where the original applies GELU. With GELU it agrees to "
            f"{largest_difference(mended):.2g}."
        )
        return Level("peers", "passed", reason, figures)
    if numbers and numbers.level.status == "passed":
        reason = f"{name} is wrong here: {first}, and the recorded original agrees with ours."
        return Level("peers", "passed", reason, figures)
    return Level("peers", "failed", f"Ours and {name} differ: {first}.", figures)


def _load(folder: Path) -> Any:
    from transformers import EomtDinov3ForUniversalSegmentation, logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = EomtDinov3ForUniversalSegmentation.from_pretrained(folder, dtype=torch.float32)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval()


def _run_layer_by_layer(peer: Any, inputs: Tensor) -> dict[str, Tensor]:
    """Outputs of transformers' model by the names of recorded tensors, on the CPU."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[name] = (output[0] if isinstance(output, tuple) else output).cpu()

        return hook

    modules = [(peer.embeddings, "patch_embeddings")]
    modules += [(layer, f"hidden_states.{i}") for i, layer in enumerate(peer.layers)]
    hooks = [module.register_forward_hook(keep(name)) for module, name in modules]
    try:
        with torch.inference_mode():
            output = peer(inputs.to(peer.device))
    finally:
        for hook in hooks:
            hook.remove()
    outputs["last_hidden_state"] = output.last_hidden_state.cpu()
    outputs["class_logits"] = output.class_queries_logits.cpu()
    outputs["mask_logits"] = output.masks_queries_logits.cpu()
    return outputs


def _compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Comparison]:
    tolerance = Tolerance()
    return {name: compare(name, ours[name], theirs[name], tolerance) for name in theirs}


@contextmanager
def _gelu_in_the_heads(peer: Any) -> Iterator[None]:
    """Gives transformers' model GELU, the original's activation, in mask head and upscaling."""
    modules = [peer.mask_head, *peer.upscale_block.block]
    before = [module.activation for module in modules]
    for module in modules:
        module.activation = torch.nn.GELU()
    try:
        yield
    finally:
        for module, activation in zip(modules, before, strict=True):
            module.activation = activation
