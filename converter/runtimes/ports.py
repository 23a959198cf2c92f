"""Which of an exported file's inputs and outputs are the model's."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from converter.errors import UnreadableFileError, UsageError
from converter.outside import visible
from converter.runtimes.exported import INPUT, OUTPUTS, Port
from converter.runtimes.layers import LAYER_OUTPUT


def find_input(path: Path, inputs: Sequence[Port], name: str | None = None) -> Port:
    """The input for the pixels.

    Args:
        path: of the file.
        inputs: all that it has.
        name: by default ``pixel_values``, or the only one of rank 4.

    Raises:
        UnreadableFileError: there is no such input, or another one beside it.
        UsageError: there is no input of the given name.
    """
    named = [port for port in inputs if port.name == (name or INPUT)]
    if name and not named:
        raise UsageError(f"{path} has no input {name!r}; it has {_listed(inputs)}.")
    pictures = named or [port for port in inputs if len(port.shape) == 4]
    if len(inputs) != 1 or len(pictures) != 1 or len(pictures[0].shape) != 4:
        raise UnreadableFileError(
            f"{path} is no export of this model: expected one input (batch, channels, height, "
            f"width), found {_listed(inputs)}.",
        )
    if pictures[0].dtype not in ("float32", "float16"):
        raise UnreadableFileError(
            f"The input of {path} has the type {pictures[0].dtype}, expected float32 or float16."
        )
    return pictures[0]


def find_outputs(
    path: Path,
    outputs: Mapping[str, Port],
    names: tuple[str, str] | None = None,
    *,
    remedy: str,
) -> dict[str, Port]:
    """The outputs by the names of recorded tensors.

    Without given names, masks and classes have the names of our exports or of recorded tensors, or
    are the only outputs of rank 4 and 3. Where several have rank 3, classes are the one with as
    many queries as the masks.

    Args:
        path: of the file.
        outputs: all that it has, by name.
        names: those of masks and classes.
        remedy: what to do where they are not recognised.

    Raises:
        UnreadableFileError: masks or classes are missing, or cannot be told from others.
        UsageError: there is no output of a given name, or it has another rank.
    """
    if names:
        given = dict(zip(names, OUTPUTS.values(), strict=True))
        for name, rank in zip(names, (4, 3), strict=True):
            if name not in outputs:
                listed = _listed(outputs.values())
                raise UsageError(f"{path} has no output {name!r}; it has {listed}.")
            found_rank = len(outputs[name].shape)
            if found_rank != rank:
                raise UsageError(
                    f"The output {name!r} of {path} has rank {found_rank}, expected {rank}: masks "
                    "of rank 4 come first, then classes of rank 3."
                )
    else:
        given = {**OUTPUTS, **{name: name for name in OUTPUTS.values()}}
    found = {given[name]: port for name, port in outputs.items() if name in given}
    found |= {name: port for name, port in outputs.items() if LAYER_OUTPUT.fullmatch(name)}
    for recorded, rank in (("mask_logits", 4), ("class_logits", 3)):
        taken = list(found.values())
        others = [p for p in outputs.values() if p not in taken and len(p.shape) == rank]
        if rank == 3 and len(others) > 1:
            queries = found["mask_logits"].shape[1]
            others = [port for port in others if queries and port.shape[1] == queries]
        if recorded not in found and len(others) == 1:
            found[recorded] = others[0]
        if recorded not in found or len(found[recorded].shape) != rank:
            raise UnreadableFileError(
                f"{path} is no export of this model: expected outputs for masks, of rank 4, and "
                f"for classes, of rank 3; found {_listed(outputs.values())}.",
                remedy,
            )
    for name, port in found.items():
        if name != "mask_logits" and len(port.shape) != 3:
            raise UnreadableFileError(
                f"The output {visible(port.name)} of {path} has rank {len(port.shape)}, expected 3."
            )
    return found


def _listed(ports: Iterable[Port]) -> str:
    shown = [f"{visible(port.name)} ({port.shape_text})" for port in list(ports)[:10]]
    return ", ".join(shown) or "none"
