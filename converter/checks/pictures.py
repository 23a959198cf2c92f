"""Takes recorded pictures through a model's preprocessing, network and post-processing."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converter.catalog import Task
from converter.checks.comparison import (
    FLOAT32,
    ROUNDED,
    Comparison,
    Tolerance,
    equal_results,
    largest_difference,
)
from converter.checks.computed import Computed
from converter.checks.numbers import LOGITS, Compared, compare_all, compare_outputs, widening
from converter.checks.pipeline import Prepared, compute_logits, prepare, segment
from converter.checks.recorded import Recorded, RecordedPictures, read_pictures
from converter.checks.verdict import Level
from converter.class_names import unnamed
from converter.configs import PREPROCESSOR, preprocessor_config
from converter.files import read_json_object
from converter.models import compiler_errors
from converter.runtimes.network import ExportedNetwork
from reference_model import (
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtImageProcessor,
)

if TYPE_CHECKING:
    from converter.models import Network

# what may be wrong in a model although the results for all recorded pictures are right
NOT_SHOWN = (
    "names of classes, and their order, in id2label",
    "scores of instances and classes",
)


# the settings that decide which pixels a picture becomes; errors in the others show in the logits
_PREPARATION = ("do_split_image", "do_resize", "size", "do_pad", "resample")


def check_pictures(
    model: "Network",
    folder: Path,
    task: str | None,
    recorded: Recorded,
    tolerance: Tolerance,
    *,
    size_is_meant: bool,
    rounded: EomtDinov3ForUniversalSegmentation | None = None,
    rounded_to: str | None = None,
    computed: Computed | None = None,
    same_weights: EomtDinov3ForUniversalSegmentation | None = None,
) -> Level:
    """Takes the recorded pictures through the processor, the network and the post-processing.

    Args:
        model: on the device where it is to run.
        folder: the folder with its config.json and preprocessor_config.json.
        task: the task that the model was converted for, if known.
        recorded: the recording to compare it with.
        tolerance: how far apart logits may be, and how many pixels of the results may differ.
        size_is_meant: whether the image size in the model's configuration is known to be intended.
        rounded: the model with rounded weights, if ``model`` has the weights before rounding; its
            results are checked too.
        rounded_to: ``bfloat16`` or ``float16``, the dtype of the rounded weights.
        computed: the model compiled or in 16 bits, if it is to be checked, too.
        same_weights: for an exported model, the reference model with its weights, if known.

    Raises:
        UnreadableFileError: a picture file is not the one that the recording was made from.
    """
    if model.config.num_channels != 3:
        reason = f"Pictures have 3 channels, the model takes {model.config.num_channels}."
        return Level("pictures", "not checked", reason)
    pictures = read_pictures(recorded)
    if isinstance(pictures, str):
        return Level("pictures", "not checked", pictures)
    recorded_size, size = tuple(pictures.pixels.shape[-2:]), model.config.input_size
    if size_is_meant and size != recorded_size:
        reason = "The pictures were recorded at {}x{} pixels, the model is for {}x{}."
        return Level("pictures", "not checked", reason.format(*recorded_size, *size))
    notes: list[str] = []
    problems, unchecked, stuff = _check_labels(model.config, folder, task, pictures)
    figures: dict[str, Any] = {}
    inputs = _prepare(folder, {}, pictures)
    if isinstance(inputs, str) or _difference(inputs, pictures):
        problems += _blame_preparation(folder, model.config.input_size, inputs, pictures)
    else:
        found, figures = _check_outputs(
            model, same_weights, folder, inputs, pictures, tolerance, stuff
        )
        problems += found
        if rounded and rounded_to and "results" in figures:
            logits = compute_logits(rounded, inputs)
            shares = _equal_results(folder, logits, inputs, pictures, stuff)
            least = ROUNDED[rounded_to].equal_pixels
            problems += _differing_results(shares, least, f" with weights in {rounded_to}")
            figures["rounded_equal_pixels"] = min(shares.values())
            notes.append(
                f"With weights in {rounded_to} results are equal in "
                f"{figures['rounded_equal_pixels']:.1%} of the pixels (at least {least:.1%})."
            )
        if computed and not problems and not isinstance(model, ExportedNetwork):
            found, of_computed = _check_computed(
                computed, rounded or model, folder, inputs, pictures, stuff, rounded_to
            )
            problems += found
            figures |= of_computed
            notes.append(f"The figures are for the model {computed.computation}.")
        unchecked += _unchecked_results(pictures, figures.get("results", {}))
    figures |= {
        "pictures": len(pictures.images),
        **({"task": pictures.task} if pictures.task else {}),
        "not_checked": unchecked,
        "not_shown": list(NOT_SHOWN),
    }
    if problems:
        return Level("pictures", "failed", " ".join(problems), figures)
    notes += [f"Not checked: {'; '.join(unchecked)}."] if unchecked else []
    notes.append(f"Not shown by any recording: {'; '.join(NOT_SHOWN)}.")
    return Level("pictures", "passed", " ".join(notes), figures)


# task and classes -------------------------------------------------------------------------------


def _check_labels(
    config: EomtDinov3Config, folder: Path, task: str | None, pictures: RecordedPictures
) -> tuple[list[str], list[str], tuple[int, ...] | None]:
    """Compares the model's task and stuff classes with the recorded ones.

    Returns:
        What is wrong, in sentences; what could not be checked; and the stuff classes to use
        if the processor has none.
    """
    problems: list[str] = []
    unchecked: list[str] = []
    if pictures.task is None:
        unchecked.append("the task: recorded.json does not give it")
    elif task is None:
        unchecked.append("the task: no conversion.json gives the model's")
    elif task != pictures.task:
        problems.append(
            f"The model's task, by conversion.json or its published name, is {task}; recorded.json "
            f"says {pictures.task}."
        )
    if pictures.stuff_classes is None:
        return problems, [*unchecked, "stuff_classes: recorded.json does not give them"], None
    # transformers does not know this key, but the reference model's processor uses it if present
    theirs = read_json_object(folder / PREPROCESSOR).get("stuff_classes")
    names = config.id2label.values()
    placeholders = set(names) == set(unnamed(len(names)).names)
    if pictures.stuff_classes and placeholders and not config.stuff_classes and not theirs:
        unchecked.append(
            "stuff_classes: config.json has neither these nor names of classes, so those in "
            "recorded.json were used"
        )
        return problems, unchecked, pictures.stuff_classes
    if theirs is None or config.stuff_classes:
        problems += _differing_stuff("config.json", list(config.stuff_classes or ()), pictures)
    if theirs is not None:
        problems += _differing_stuff(PREPROCESSOR, theirs, pictures)
    return problems, unchecked, None


def _differing_stuff(file: str, found: Any, pictures: RecordedPictures) -> Iterator[str]:
    recorded = list(pictures.stuff_classes or ())
    ids = found if isinstance(found, list) else [None]
    if any(type(each) is not int for each in ids) or set(ids) != set(recorded):
        yield (
            f"stuff_classes in {file} is {json.dumps(found)}, recorded.json says {recorded}. "
            "Convert again, with --labels naming a JSON file of categories with isthing."
        )


# preprocessing ----------------------------------------------------------------------------------


def _prepare(
    folder: Path, settings: Mapping[str, Any], pictures: RecordedPictures
) -> Prepared | str:
    """The recorded pictures, prepared by the model's processor; or the reason why it cannot.

    Args:
        folder: the model's folder.
        settings: values that replace those in its preprocessor_config.json.
        pictures: the pictures to prepare.
    """
    recorded = tuple(pictures.pixels.shape[-2:])
    try:
        processor = EomtImageProcessor.from_pretrained(folder, **settings)
        makes_fit = processor.do_resize or processor.do_pad
        if makes_fit and processor.image_size != recorded:  # checked first, as it may be huge
            return f"its size is {list(processor.image_size)}, expected {[*recorded]} as recorded"
        return prepare(processor, pictures.images)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        return f"it cannot be used ({error})"


def _difference(inputs: Prepared, pictures: RecordedPictures) -> str:
    """How the inputs differ from the recorded ones; empty if they are equal."""
    ours, theirs = inputs.pixels, pictures.pixels
    if ours.shape != theirs.shape:
        return f"the shape is {list(ours.shape)}, expected {list(theirs.shape)} as recorded"
    if different := int((ours != theirs).any(1).sum()):
        return f"{different:,} of {theirs[:, 0].numel():,} pixels differ"
    windows, recorded = inputs.origins, pictures.tensors.get("pipeline.origins")
    if windows is None or recorded is None:
        return "" if windows is recorded else "only one of the two is cut into windows"
    return "" if torch.equal(windows, recorded) else "the windows are at other positions"


def _blame_preparation(
    folder: Path,
    input_size: tuple[int, int],
    inputs: Prepared | str,
    pictures: RecordedPictures,
) -> list[str]:
    """Says which settings in the model's files keep the pictures from becoming the recorded pixels.

    Tries the expected value for each setting that differs, one at a time and then all together.

    Args:
        folder: the model's folder.
        input_size: (height, width) in its config.json.
        inputs: what `_prepare` returned for the pictures: not the recorded pixels.
        pictures: the recorded pictures.
    """
    found = read_json_object(folder / PREPROCESSOR)
    height, width = pictures.pixels.shape[-2:]
    task: Task = "semantic" if "pipeline.crops" in pictures.tensors else "panoptic"
    right = preprocessor_config(task, (height, width))
    differing = {key: right[key] for key in _PREPARATION if found.get(key) != right[key]}
    tries = [{key: value} for key, value in differing.items()]
    if len(differing) > 1:
        tries.append(differing)
    for settings in tries:
        mended = _prepare(folder, settings, pictures)
        if not isinstance(mended, str) and not _difference(mended, pictures):
            problems = [
                f"{key} in {PREPROCESSOR} is {json.dumps(found.get(key))}, the recorded pictures "
                f"were prepared with {json.dumps(value)}."
                for key, value in settings.items()
            ]
            break
    else:
        if isinstance(inputs, str):
            problems = [f"{PREPROCESSOR} does not fit the recorded pictures: {inputs}."]
        else:
            reason = _difference(inputs, pictures)
            problems = [
                f"{PREPROCESSOR} does not turn the pictures into the recorded pixels: {reason}."
            ]
    if input_size != (height, width):
        problems.append(
            f"image_size in config.json is {list(input_size)}, expected {[height, width]} as "
            "recorded."
        )
    return problems


# network and post-processing --------------------------------------------------------------------


def _check_outputs(
    model: "Network",
    same_weights: EomtDinov3ForUniversalSegmentation | None,
    folder: Path,
    inputs: Prepared,
    pictures: RecordedPictures,
    tolerance: Tolerance,
    stuff: tuple[int, ...] | None,
) -> tuple[list[str], dict[str, Any]]:
    """Compares logits and results; returns what is wrong, in sentences, and the figures."""
    recorded = {f"pipeline.{name}": pictures.tensors[f"pipeline.{name}"] for name in LOGITS}
    try:
        if isinstance(model, ExportedNetwork):
            network = same_weights if tolerance == FLOAT32 else None
            logits = compute_logits(model, inputs)
            found = _compare_logits(logits, recorded, tolerance, inputs, network)
        else:
            found = compare_outputs(
                lambda: compute_logits(model, inputs), [model], recorded, tolerance
            )
    except ValueError as error:
        return [f"The model cannot run on the recorded pictures: {error}."], {}
    logits, compared = found.outputs, found.compared
    problems = [comparison.failure for comparison in compared.values() if comparison.failure]
    figures = _figures(compared, tolerance, found.widened)
    if not all(comparison.same_shape for comparison in compared.values()):
        return problems, figures
    results = _equal_results(folder, logits, inputs, pictures, stuff)
    if results:
        problems += _differing_results(results, tolerance.equal_pixels)
        figures |= _result_figures(results, tolerance.equal_pixels)
    return problems, figures


def _compare_logits(
    logits: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: Tolerance,
    inputs: Prepared,
    network: EomtDinov3ForUniversalSegmentation | None,
) -> Compared:
    """Compares logits that cannot be computed in float64.

    Args:
        logits: computed in another way than by the reference model in float32.
        expected: what they should be.
        tolerance: how far apart they may be.
        inputs: what they were computed from.
        network: the reference model with the same weights, to allow for what float32 alone does to
            them; None to allow nothing.
    """
    compared = compare_all(logits, expected, tolerance)
    if network is None or not any(comparison.failure for comparison in compared.values()):
        return Compared(logits, compared)
    wider = widening(lambda: compute_logits(network, inputs), [network], expected, tolerance)
    return Compared(logits, compare_all(logits, expected, tolerance, wider), wider)


def _figures(
    compared: Mapping[str, Comparison], tolerance: Tolerance, widened: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "tolerance": tolerance.absolute,
        "relative_tolerance": tolerance.relative,
        "widened": dict(widened),
        "max_abs": largest_difference(compared),
        "compared": {name: comparison.to_dict() for name, comparison in compared.items()},
    }


def _result_figures(results: Mapping[str, float], least: float) -> dict[str, Any]:
    return {
        "results": results,
        "equal_pixels": min(results.values()),
        "least_equal_pixels": least,
    }


def _check_computed(
    computed: Computed,
    own: EomtDinov3ForUniversalSegmentation,
    folder: Path,
    inputs: Prepared,
    pictures: RecordedPictures,
    stuff: tuple[int, ...] | None,
    rounded_to: str | None,
) -> tuple[list[str], dict[str, Any]]:
    """Compares logits and results of a computation, as `_check_outputs` does those of float32.

    ``own`` is the model with the same weights in float32; ``rounded_to`` is their dtype, if they
    were rounded.
    """
    tolerance, how = computed.tolerance, f" when {computed.computation}"
    with compiler_errors():
        logits = {n: t.float() for n, t in compute_logits(computed.model, inputs).items()}
    beside: Mapping[str, Tensor] = pictures.tensors
    if computed.rounded:
        beside = compute_logits(own, inputs)
    theirs = {name: beside[name] for name in logits}
    network = own if computed.computation.dtype == "float32" else None
    found = _compare_logits(logits, theirs, tolerance, inputs, network)
    problems = [f"{c.failure[:-1]}{how}." for c in found.compared.values() if c.failure]
    figures = computed.computation.figures | _figures(found.compared, tolerance, found.widened)
    if results := _equal_results(folder, logits, inputs, pictures, stuff):
        rounding = ROUNDED[rounded_to].equal_pixels if computed.rounded and rounded_to else 1.0
        least = min(tolerance.equal_pixels, rounding)
        problems += _differing_results(results, least, how)
        figures |= _result_figures(results, least)
    return problems, figures


def _differing_results(shares: Mapping[str, float], least: float, how: str = "") -> Iterator[str]:
    """Says, in a sentence, which result agrees least, if it agrees less than it must."""
    worst = min(shares, key=lambda name: shares[name])
    if shares[worst] < least:
        what = "" if worst.endswith("_areas") else "the pixels of "
        yield (
            f"{shares[worst]:.2%} of {what}{worst} match the recording{how}, less than {least:.1%}."
        )


def _equal_results(
    folder: Path,
    logits: Mapping[str, Tensor],
    inputs: Prepared,
    pictures: RecordedPictures,
    stuff: tuple[int, ...] | None,
) -> dict[str, float]:
    """The share of each recorded result that the model reproduces, by the result's name."""
    if pictures.task is None:
        return {}
    # A threshold decides which queries become segments, and rounding may put a correct model on
    # either side of it. So the recorded class logits decide; the model's were compared above.
    logits = {**logits, "pipeline.class_logits": pictures.tensors["pipeline.class_logits"]}
    areas = (t for name, t in pictures.tensors.items() if name.endswith(".instance_areas"))
    found = segment(
        EomtImageProcessor.from_pretrained(folder),
        pictures.task,
        logits,
        inputs,
        stuff_classes=stuff,
        top_k=max(map(len, areas), default=0),
    )
    return equal_results(found, pictures.tensors)


def _unchecked_results(pictures: RecordedPictures, shares: Mapping[str, float]) -> list[str]:
    """The recorded results that nothing was compared with, in words."""
    if not shares:
        return ["results: the recording has none for its task"]
    maps = (n for n in pictures.tensors if n.endswith(".semantic") or ".panoptic@" in n)
    left = [name for name in maps if name not in shares]
    return [f"{len(left)} results such as {left[0]}"] if left else []
