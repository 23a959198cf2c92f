"""Traces the model into one graph, whose outputs have a fixed order and are float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from converter.checks.diagnosis.stages import named_outputs
from converter.configs import check_image_size
from converter.errors import EomtConvertError
from converter.runtimes.exported import INPUT, OUTPUTS
from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation


def output_names(config: EomtDinov3Config, *, layers: bool) -> tuple[str, ...]:
    """The names of an exported file's outputs, in order.

    Args:
        config: the model's configuration.
        layers: whether every layer's output is among them.
    """
    if not layers:
        return tuple(OUTPUTS)
    hidden_states = (f"hidden_states.{i}" for i in range(config.num_hidden_layers))
    return (*OUTPUTS, "patch_embeddings", *hidden_states, "last_hidden_state")


def trace(
    model: EomtDinov3ForUniversalSegmentation,
    *,
    image_size: tuple[int, int] | None,
    layers: bool,
) -> ExportedProgram:
    """Traces the model in evaluation mode, in its own dtype.

    The program takes ``pixel_values``, (batch, channels, height, width) float32, and returns a
    tuple of float32 tensors, which have the names and the order of `output_names`; a dot in a name
    is an underscore in the program's signature. Its tensors have the model's names and share its
    memory. It has no stack traces, and no example of the input.

    Args:
        model: masked attention must be off.
        image_size: (height, width) of the input in pixels; None for any multiples of the patch size
            from two patches on.
        layers: whether to return every layer's output too.

    Raises:
        EomtConvertError: the model's masked attention is on.
        UsageError: the image size is not a multiple of the patch size.
    """
    if model.attn_mask_probs.any():
        raise EomtConvertError(
            "Masked attention is on in the model: attn_mask_probs is "
            f"{model.attn_mask_probs.tolist()}.",
            "Masked attention is for training; a converted model has zeros there. Convert again.",
        )
    config = model.eval().config
    names = output_names(config, layers=layers)
    patch = config.patch_size
    check_image_size(image_size, patch)
    # two unequal numbers above 1, or the tracer takes the size for a constant
    height, width = image_size or (3 * patch, 5 * patch)
    pixels = torch.zeros(2, config.num_channels, height, width)
    axes: dict[int, Any] = {0: Dim("batch", min=1)}
    if image_size is None:
        axes |= {2: patch * Dim("rows", min=2), 3: patch * Dim("columns", min=2)}
    with torch.no_grad(), _returning(model, names):
        program = torch.export.export(model, (pixels,), dynamic_shapes={INPUT: axes}, strict=False)
    _name_outputs(program, names)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with paths of this machine
    program.example_inputs = None
    ranges = program.range_constraints
    in_order = sorted(ranges.items(), key=lambda entry: str(entry[0]))  # the tracer took a set's
    ranges.clear()
    ranges.update(in_order)
    return program


@contextmanager
def _returning(model: EomtDinov3ForUniversalSegmentation, names: tuple[str, ...]) -> Iterator[None]:
    """Makes the model return a tuple of outputs in this block.

    Hooks do so and not a module around the model, because that would change the names of tensors
    and modules.
    """

    def ask_for_layers(_: Any, arguments: Any, options: dict[str, Any]) -> Any:
        return arguments, {**options, "output_hidden_states": True}

    def choose(_: Any, __: Any, output: Any) -> tuple[Tensor, ...]:
        found = named_outputs(output)
        return tuple(found[OUTPUTS.get(name, name)].float() for name in names)

    hooks = (
        model.register_forward_pre_hook(ask_for_layers, with_kwargs=True),
        model.register_forward_hook(choose),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _name_outputs(program: ExportedProgram, names: tuple[str, ...]) -> None:
    """Gives the outputs their names, which torch keeps when it saves and loads a program."""
    (returned,) = program.graph.output_node().args
    for node, spec, name in zip(returned, program.graph_signature.output_specs, names, strict=True):
        node.name = name.replace(".", "_")
        spec.arg.name = node.name
