"""Recorded pictures taken through a model's preprocessing, network and post-processing."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.catalog import Task
from converter.checks.comparison import ROUNDED, Tolerance, equal_results, largest_difference
from converter.checks.numbers import LOGITS, compare_outputs
from converter.checks.pipeline import Prepared, compute_logits, prepare, segment
from converter.checks.recorded import Recorded, RecordedPictures, read_pictures
from converter.checks.verdict import Level
from converter.class_names import unnamed
from converter.configs import preprocessor_config
from converter.files import read_json_object
from reference_model import (
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtImageProcessor,
)

# what may be wrong in a model whose recorded pictures all come out right
NOT_SHOWN = (
    "names of classes, and their order, in id2label",
    "scores of instances and classes",
)

_PREPROCESSOR = "preprocessor_config.json"

# what decides how a picture becomes pixels; what becomes of them then shows in the logits
_PREPARATION = ("do_split_image", "do_resize", "size", "do_pad", "resample")


def check_pictures(
    model: EomtDinov3ForUniversalSegmentation,
    folder: Path,
    task: str | None,
    recorded: Recorded,
    tolerance: Tolerance,
    *,
    size_is_meant: bool,
    rounded: EomtDinov3ForUniversalSegmentation | None = None,
    rounded_to: str | None = None,
) -> Level:
    """Takes the recorded pictures through the processor, the network and the post-processing.

    Args:
        model: on the device where it is to run.
        folder: with its config.json and preprocessor_config.json.
        task: what it was converted to segment, where that is known.
        recorded: what to hold it against.
        tolerance: how far apart logits, and how many pixels of the results, may be.
        size_is_meant: whether the model is known to be meant for the size in its configuration.
        rounded: where ``model`` has the sums that weights were rounded from, the one with these
            weights, whose results are looked at too.
        rounded_to: ``bfloat16`` or ``float16``, the type of these weights.

    Raises:
        UnreadableFileError: the pictures of the recording are not those that it was made from.
    """
    if model.config.num_channels != 3:
        return Level("pictures", "not checked", "Pictures have three channels, not the model's.")
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
        found, figures = _check_outputs(model, folder, inputs, pictures, tolerance, stuff)
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


# what the model is for --------------------------------------------------------------------------


def _check_labels(
    config: EomtDinov3Config, folder: Path, task: str | None, pictures: RecordedPictures
) -> tuple[list[str], list[str], tuple[int, ...] | None]:
    """What is wrong with task and stuff classes, and what of them cannot be told.

    Returns:
        Both in sentences; and the stuff classes to use in place of the processor's, if it has none.
    """
    problems: list[str] = []
    unchecked: list[str] = []
    if pictures.task is None:
        unchecked.append("the task, which recorded.json does not say")
    elif task is None:
        unchecked.append("the task, which no conversion.json says of the model")
    elif task != pictures.task:
        problems.append(
            f"The model's task, by conversion.json or its published name, is {task}; recorded.json "
            f"says {pictures.task}."
        )
    if pictures.stuff_classes is None:
        return problems, [*unchecked, "stuff_classes, which recorded.json does not say"], None
    # transformers has no such key there, but the reference model's processor prefers it
    theirs = read_json_object(folder / _PREPROCESSOR).get("stuff_classes")
    names = config.id2label.values()
    placeholders = set(names) == set(unnamed(len(names)).names)
    if pictures.stuff_classes and placeholders and not config.stuff_classes and not theirs:
        unchecked.append(
            "stuff_classes, of which config.json has none, nor names of classes; those of "
            "recorded.json were used"
        )
        return problems, unchecked, pictures.stuff_classes
    if theirs is None or config.stuff_classes:
        problems += _differing_stuff("config.json", list(config.stuff_classes or ()), pictures)
    if theirs is not None:
        problems += _differing_stuff(_PREPROCESSOR, theirs, pictures)
    return problems, unchecked, None


def _differing_stuff(file: str, found: Any, pictures: RecordedPictures) -> Iterator[str]:
    recorded = list(pictures.stuff_classes or ())
    ids = found if isinstance(found, list) else [None]
    if any(type(each) is not int for each in ids) or set(ids) != set(recorded):
        yield (
            f"stuff_classes in {file} is {json.dumps(found)}, recorded.json says {recorded}. "
            "Categories with isthing, given with --labels, tell a conversion which classes are "
            "stuff."
        )


# preprocessing ----------------------------------------------------------------------------------


def _prepare(
    folder: Path, settings: Mapping[str, Any], pictures: RecordedPictures
) -> Prepared | str:
    """The recorded pictures as a model's processor makes them fit, or why it cannot.

    Args:
        folder: of the model.
        settings: to be other than in its preprocessor_config.json.
        pictures: to make fit.
    """
    recorded = tuple(pictures.pixels.shape[-2:])
    try:
        processor = EomtImageProcessor.from_pretrained(folder, **settings)
        makes_fit = processor.do_resize or processor.do_pad
        if makes_fit and processor.image_size != recorded:  # however large it may be
            return f"its size is {list(processor.image_size)}, that of the recording {[*recorded]}"
        return prepare(processor, pictures.images)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        return f"it cannot be used ({error})"


def _difference(inputs: Prepared, pictures: RecordedPictures) -> str:
    """How inputs differ from the recorded ones; empty if they are equal."""
    ours, theirs = inputs.pixels, pictures.pixels
    if ours.shape != theirs.shape:
        return f"they have the shape {list(ours.shape)}, recorded is the shape {list(theirs.shape)}"
    if different := int((ours != theirs).any(1).sum()):
        return f"{different:,} of {theirs[:, 0].numel():,} pixels differ"
    windows, recorded = inputs.origins, pictures.tensors.get("pipeline.origins")
    if windows is None or recorded is None:
        return "" if windows is recorded else "only one of the two is cut into windows"
    return "" if torch.equal(windows, recorded) else "windows are cut elsewhere"


def _blame_preparation(
    folder: Path,
    input_size: tuple[int, int],
    inputs: Prepared | str,
    pictures: RecordedPictures,
) -> list[str]:
    """What in the model's files keeps the pictures from becoming the recorded pixels.

    It is the value of preprocessor_config.json without which they would, or else all values
    together that are not those of the recording's conversion.

    Args:
        folder: of the model.
        input_size: (height, width) by its config.json.
        inputs: what `_prepare` makes of the pictures, which are not the recorded pixels.
        pictures: that they were to be made of.
    """
    found = read_json_object(folder / _PREPROCESSOR)
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
                f"{key} in {_PREPROCESSOR} is {json.dumps(found.get(key))}, the recorded pictures "
                f"were prepared with {json.dumps(value)}."
                for key, value in settings.items()
            ]
            break
    else:
        if isinstance(inputs, str):
            problems = [f"By {_PREPROCESSOR} the recorded pictures have no pixels: {inputs}."]
        else:
            reason = _difference(inputs, pictures)
            problems = [f"By {_PREPROCESSOR} the recorded pictures become other pixels: {reason}."]
    if input_size != (height, width):
        problems.append(
            f"image_size in config.json is {list(input_size)}, that of the recorded pictures is "
            f"{[height, width]}."
        )
    return problems


# network and post-processing --------------------------------------------------------------------


def _check_outputs(
    model: EomtDinov3ForUniversalSegmentation,
    folder: Path,
    inputs: Prepared,
    pictures: RecordedPictures,
    tolerance: Tolerance,
    stuff: tuple[int, ...] | None,
) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with logits and results, and the figures."""
    recorded = {f"pipeline.{name}": pictures.tensors[f"pipeline.{name}"] for name in LOGITS}
    try:
        found = compare_outputs(lambda: compute_logits(model, inputs), [model], recorded, tolerance)
    except ValueError as error:
        return [f"The recorded pictures do not suit the model: {error}."], {}
    logits, compared = found.outputs, found.compared
    problems = [comparison.failure for comparison in compared.values() if comparison.failure]
    figures: dict[str, Any] = {
        "tolerance": tolerance.absolute,
        "relative_tolerance": tolerance.relative,
        "widened": dict(found.widened),
        "max_abs": largest_difference(compared),
        "compared": {name: comparison.to_dict() for name, comparison in compared.items()},
    }
    if not all(comparison.same_shape for comparison in compared.values()):
        return problems, figures
    results = _equal_results(folder, logits, inputs, pictures, stuff)
    if results:
        problems += _differing_results(results, tolerance.equal_pixels)
        figures |= {
            "results": results,
            "equal_pixels": min(results.values()),
            "least_equal_pixels": tolerance.equal_pixels,
        }
    return problems, figures


def _differing_results(shares: Mapping[str, float], least: float, how: str = "") -> Iterator[str]:
    """The result that is least as recorded, in a sentence, if that is less than it must be."""
    worst = min(shares, key=lambda name: shares[name])
    if shares[worst] < least:
        what = "" if worst.endswith("_areas") else "the pixels of "
        yield f"{shares[worst]:.2%} of {what}{worst} are as recorded{how}, less than {least:.1%}."


def _equal_results(
    folder: Path,
    logits: Mapping[str, Tensor],
    inputs: Prepared,
    pictures: RecordedPictures,
    stuff: tuple[int, ...] | None,
) -> dict[str, float]:
    """The share of every recorded result that comes out again, by the result's name."""
    if pictures.task is None:
        return {}
    # Which queries become segments is decided at a threshold, to either side of which a right
    # model's rounding may fall: on class logits as recorded; the model's own are compared before.
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
    """What was recorded of the results and held against nothing."""
    if not shares:
        return ["results, of which the recording has none for its task"]
    maps = (n for n in pictures.tensors if n.endswith(".semantic") or ".panoptic@" in n)
    left = [name for name in maps if name not in shares]
    return [f"{len(left)} results such as {left[0]}"] if left else []
