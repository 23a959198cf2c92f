"""Checks what another program computes: writes its inputs, and judges its outputs."""

from dataclasses import replace
from pathlib import Path

from converter.checks.pixels import Normalisation
from converter.checks.recorded import read_recorded
from converter.checks.verdict import LEVELS, Level, Verdict
from converter.errors import UnreadableFileError, UsageError
from converter.files import optional_path, prepare_place, replacing, user_path, writable
from converter.places import find_recorded

# why every level but numbers is not checked
_NO_MODEL = "Only a file of outputs was given, no model."
_NO_PICTURES = "A file has outputs for the recorded pixels only, none for pictures."


def verify_outputs(
    outputs: str | Path, *, recorded: str | Path, report: str | Path | None = None
) -> Verdict:
    """Compares outputs that another program computed with recorded ones, without a model.

    The program's input is what `verify` writes to ``save_inputs``. The verdict is on the outputs:
    it cannot tell what computed them.

    Args:
        outputs: a .npz or .safetensors file with ``mask_logits`` and ``class_logits`` (or
            ``masks_queries_logits`` and ``class_queries_logits``), and any of ``patch_embeddings``,
            ``hidden_states.N`` and ``last_hidden_state``, by which a difference is placed.
        recorded: a folder with recorded outputs, or its recorded.safetensors.
        report: an HTML file to write with the results.

    Raises:
        UnreadableFileError: the outputs or the recording cannot be read.
        UsageError: the file ends in neither .npz nor .safetensors.
        OutputError: the report cannot be written.
    """
    page = optional_path(report)
    if page:
        prepare_place(page)
    path, recording = user_path(outputs), read_recorded(find_recorded(user_path(recorded)))

    from converter.checks.comparison import computed_tolerance
    from converter.checks.diagnosis.outputs import explain
    from converter.checks.numbers import judge_outputs
    from converter.checks.outputs_file import read_outputs

    stored = read_outputs(path, recording)
    tolerance = computed_tolerance(recording.origin.computed_in)
    judged = judge_outputs(stored.tensors, recording, tolerance)
    numbers, difference, remarks = judged.level, None, [judged.level.reason]
    if numbers.status == "failed":
        explanation, difference = explain(judged, recording, tolerance)
        remarks.append(explanation)
    if stored.others:
        names = ", ".join(stored.others[:4]) + (", ..." if len(stored.others) > 4 else "")
        remarks.append(f"Not compared: {names}.")
    figures = {"outputs_sha256": stored.sha256, **recording.origin.figures(None)}
    numbers = replace(
        numbers,
        reason=" ".join(filter(None, remarks)),
        figures={**numbers.figures, **figures},
    )
    levels = {
        "numbers": numbers,
        "pictures": Level("pictures", "not checked", _NO_PICTURES),
    }
    verdict = Verdict(
        tuple(levels.get(name) or Level(name, "not checked", _NO_MODEL) for name in LEVELS),
        difference,
    )
    if page:
        from converter.checks.html_report import write_report

        write_report([page], path.name, None, verdict, recording, judged.outputs)
    return verdict


def write_inputs(place: Path, normalisation: Normalisation, recording: Path | None) -> None:
    """Writes what a model gets of the recorded pixels, as ``pixel_values`` in a .npz file.

    They are float32, (batch, channels, height, width). The same recording and model give the same
    bytes.

    Args:
        place: the .npz file.
        normalisation: of the model's preprocessor_config.json.
        recording: the recorded.safetensors, if there is one.

    Raises:
        UsageError: there is none.
        UnreadableFileError: it cannot be read, or has another number of channels than the model.
        OutputError: the file cannot be written.
    """
    import numpy as np

    if recording is None:
        raise UsageError("There are no recorded pixels to save as inputs.", "Give --recorded PATH.")
    recorded = read_recorded(recording)
    channels = recorded.pixels.shape[1]
    if channels != len(normalisation.mean):
        raise UnreadableFileError(
            f"The recorded pixels have {channels} channels, the model takes "
            f"{len(normalisation.mean)}."
        )
    values = normalisation(recorded.pixels).numpy()
    with (
        writable(place, "Give a file in a folder that you may write to."),
        replacing(place) as file,
    ):
        np.savez(file, pixel_values=values)


def inputs_place(given: str | Path | None) -> Path | None:
    """Where inputs are to be written; None if they are not asked for.

    Raises:
        UsageError: the file does not end in .npz.
        OutputError: the file cannot be written there.
    """
    place = optional_path(given)
    if place:
        if place.suffix != ".npz":
            raise UsageError(f"Inputs are saved as .npz: {place} does not end in it.")
        prepare_place(place)
    return place
