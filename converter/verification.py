"""Holds a model against evidence: what was checked, how close it came, and what was not."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from converter.catalog import find
from converter.configs import read_json_object
from converter.errors import UnreadableFileError, UsageError
from converter.recorded import Recorded, find_recorded, read_recorded
from converter.tensorfiles import (
    WEIGHTS,
    WEIGHTS_INDEX,
    ShardedTensorFile,
    TensorFile,
    open_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

    from reference_model import EomtDinov3ForUniversalSegmentation

# Largest difference in float32 between two right computations of a model whose logits reach 50:
# another order of summation moves them by about 1e-5.
TOLERANCE = 2e-4

# Weights that were rounded move the outputs by a share of their range, for each element type.
ROUNDED_TOLERANCES = {"BF16": 0.04, "F16": 0.005}

# figures that are the same wherever and whenever they are taken
_KEPT = ("tensors", "parameters", "recorded_sha256", "tolerance", "relative_tolerance")


@dataclass(frozen=True)
class Level:
    """One kind of check.

    Attributes:
        level: ``structure``, ``arithmetic`` or ``numbers``.
        status: what came of it.
        reason: in a sentence, why it failed or was not checked.
        figures: what was measured.
    """

    level: str
    status: Literal["passed", "failed", "not checked"]
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The level as JSON shows it."""
        return {
            "level": self.level,
            "status": self.status,
            "reason": self.reason,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True)
class Verdict:
    """What is known of a model.

    Attributes:
        levels: every check, also those that were not made.
    """

    levels: tuple[Level, ...]

    @property
    def verdict(self) -> Literal["passed", "failed", "unverified"]:
        """Failed if any level failed; passed if its numbers were held against a recording."""
        statuses = {level.level: level.status for level in self.levels}
        if "failed" in statuses.values():
            return "failed"
        return "passed" if statuses.get("numbers") == "passed" else "unverified"

    @property
    def reason(self) -> str:
        """Why it is not passed, in a sentence; empty if it is."""
        for level in self.levels:
            if level.status == "failed":
                return level.reason
        return next((level.reason for level in self.levels if level.level == "numbers"), "")

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON shows it."""
        return {"verdict": self.verdict, "levels": [level.to_dict() for level in self.levels]}

    def record(self) -> dict[str, Any]:
        """The verdict as conversion.json keeps it: without what another machine would round off."""
        levels = []
        for level in self.levels:
            figures = {key: level.figures[key] for key in _KEPT if key in level.figures}
            levels.append({"level": level.level, "status": level.status, "figures": figures})
        return {"verdict": self.verdict, "levels": levels}


def unverified(reason: str) -> Verdict:
    """The verdict on a model that nothing was held against."""
    return Verdict((Level("numbers", "not checked", reason),))


def verify(model: str | Path, *, recorded: str | Path | None = None) -> Verdict:
    """Checks a converted model.

    Its tensors must be those that its config.json asks for, have the digests that its
    conversion.json gives, and compute what was recorded.

    Args:
        model: folder of the model.
        recorded: a folder with recorded outputs, or its recorded.safetensors. By default those of
            the catalogue's entry that conversion.json names, if they come with the package.

    Raises:
        UnreadableFileError: the model or the recording cannot be read.
    """
    folder = Path(model).expanduser()
    _find_weights(folder)
    conversion = folder / "conversion.json"
    history = read_json_object(conversion) if conversion.is_file() else None
    evidence = Path(recorded).expanduser() if recorded else _recorded_of(history)
    return check(folder, find_recorded(evidence) if evidence else None, _digests_in(history))


def check(
    folder: Path,
    recorded: Path | None,
    digests: Mapping[str, str] | None,
    *,
    allow_nonfinite: bool = False,
) -> Verdict:
    """Checks the model in a folder against a recording and the digests of its tensors.

    Weights that are NaN or infinite fail it, unless they are allowed.

    Raises:
        UnreadableFileError: the model or the recording cannot be read.
    """
    evidence = read_recorded(recorded) if recorded else None
    with open_tensors(_find_weights(folder)) as file:
        levels = [_check_arithmetic(file, digests)]
        dtypes = {info.dtype for info in file.tensors.values()}
    model = _load(folder)
    if isinstance(model, Level):
        levels.insert(0, model)
        levels.append(Level("numbers", "not checked", "The model cannot be built."))
        return Verdict(tuple(levels))
    levels.insert(0, _structure(model, allow_nonfinite=allow_nonfinite))
    if evidence is None:
        levels.append(Level("numbers", "not checked", "No recorded outputs to check against."))
    else:
        levels.append(_check_numbers(model, folder, evidence, dtypes))
    return Verdict(tuple(levels))


def _find_weights(folder: Path) -> Path:
    for name in (WEIGHTS, WEIGHTS_INDEX):
        if (folder / name).is_file():
            return folder / name
    raise UnreadableFileError(
        f"{folder} is no folder with a {WEIGHTS}, or its shards.",
        "Give the folder of a converted model.",
    )


def _recorded_of(history: Mapping[str, Any] | None) -> Path | None:
    name = (history or {}).get("checkpoint")
    try:
        return find(name).recorded if isinstance(name, str) else None
    except UsageError:
        return None


def _digests_in(history: Mapping[str, Any] | None) -> dict[str, str] | None:
    if history is None:
        return None
    try:
        return {name: entry["sha256"] for name, entry in history["tensors"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableFileError("conversion.json lists no digests of tensors.") from error


def _check_arithmetic(
    file: TensorFile | ShardedTensorFile, expected: Mapping[str, str] | None
) -> Level:
    if expected is None:
        return Level("arithmetic", "not checked", "There is no conversion.json.")
    names = sorted({*expected, *file.tensors})
    wrong = [
        name
        for name in names
        if name not in file.tensors or file.sha256(name) != expected.get(name)
    ]
    figures = {"tensors": len(names), "different": wrong}
    if wrong:
        reason = f"{wrong[0]} is not what conversion.json says" + (
            f", nor are {len(wrong) - 1} other tensors." if len(wrong) > 1 else "."
        )
        return Level("arithmetic", "failed", reason, figures)
    return Level("arithmetic", "passed", figures=figures)


def _load(folder: Path) -> "EomtDinov3ForUniversalSegmentation | Level":
    import torch

    from reference_model import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    values = read_json_object(folder / "config.json")
    try:
        config = EomtDinov3Config.from_dict(values)
    except (ValueError, TypeError, KeyError) as error:
        raise UnreadableFileError(f"{folder / 'config.json'}: {error}") from error
    try:
        # Rounded weights are held against the recording as they are, computed with in float32.
        return EomtDinov3ForUniversalSegmentation.from_pretrained(
            folder, config=config, dtype=torch.float32
        )
    except ValueError as error:
        return Level("structure", "failed", str(error))


def _structure(model: "EomtDinov3ForUniversalSegmentation", *, allow_nonfinite: bool) -> Level:
    state = model.state_dict()
    figures = {"tensors": len(state), "parameters": sum(p.numel() for p in model.parameters())}
    for name, tensor in state.items():
        if not allow_nonfinite and not bool(tensor.isfinite().all()):
            return Level("structure", "failed", f"{name} holds NaN or infinity.", figures)
    return Level("structure", "passed", figures=figures)


def _check_numbers(
    model: "EomtDinov3ForUniversalSegmentation",
    folder: Path,
    recorded: Recorded,
    dtypes: set[str],
) -> Level:
    relative = max((ROUNDED_TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)
    pixel_values = _normalise(recorded.pixels, folder / "preprocessor_config.json")
    try:
        pairs = list(_pairs(model, pixel_values, recorded, rounded=relative > 0))
    except ValueError as error:
        return Level("numbers", "failed", f"The recorded input does not suit the model: {error}")
    compared = {name: _compare(name, ours, theirs, relative) for name, ours, theirs in pairs}
    largest = [c.max_abs for c in compared.values()]
    figures = {
        "recorded_sha256": recorded.sha256,
        "tolerance": TOLERANCE,
        "relative_tolerance": relative,
        "max_abs": max(largest) if all(map(math.isfinite, largest)) else None,
        "compared": {name: comparison.to_dict() for name, comparison in compared.items()},
    }
    failures = [c.failure for c in compared.values() if c.failure]
    if failures:
        return Level("numbers", "failed", failures[0], figures)
    return Level("numbers", "passed", figures=figures)


def _normalise(pixels: "Tensor", preprocessor: Path) -> "Tensor":
    """Rescales and normalises uint8 pixels as a model's own preprocessor_config.json says.

    With its usual values the result is, bit for bit, the original's (pixels / 255 - mean) / std.
    """
    import torch

    values = read_json_object(preprocessor)
    try:
        channels = (1, -1, 1, 1)
        mean = torch.tensor(values["image_mean"], dtype=torch.float32).reshape(channels)
        std = torch.tensor(values["image_std"], dtype=torch.float32).reshape(channels)
        scale = float(values["rescale_factor"])
        # the memory format of decoded pictures, which decides how the patch convolution rounds
        scaled = pixels.to(torch.float64, memory_format=torch.channels_last) * scale
        return (scaled.to(torch.float32) - mean) / std
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UnreadableFileError(
            f"{preprocessor} has no usable rescale_factor, image_mean and image_std: {error}."
        ) from error


def _pairs(
    model: "EomtDinov3ForUniversalSegmentation",
    pixel_values: "Tensor",
    recorded: Recorded,
    *,
    rounded: bool,
) -> "Iterator[tuple[str, Tensor, Tensor]]":
    """Every recorded tensor beside the model's own, by the name of the recording.

    Masked attention is cut off where a mask logit is 0, which weights that were rounded move: with
    them only the block is compared that no mask has reached yet.
    """
    import torch

    with torch.inference_mode():
        output = model(pixel_values, output_hidden_states=True)
        yield "mask_logits", output.masks_queries_logits, recorded.tensors["mask_logits"]
        yield "class_logits", output.class_queries_logits, recorded.tensors["class_logits"]
        embeddings, *hidden_states = output.hidden_states
        if "patch_embeddings" in recorded.tensors:
            yield "patch_embeddings", embeddings, recorded.tensors["patch_embeddings"]
        for i, theirs in enumerate(recorded.numbered("hidden_states")):
            # a recording may have more layers than the model: that is a difference too
            ours = hidden_states[i] if i < len(hidden_states) else torch.empty(0)
            yield f"hidden_states.{i}", ours[: len(theirs)], theirs
        if "last_hidden_state" in recorded.tensors:
            theirs = recorded.tensors["last_hidden_state"]
            yield "last_hidden_state", output.last_hidden_state[: len(theirs)], theirs

        masks = recorded.numbered("masked.mask_logits")
        classes = recorded.numbered("masked.class_logits")
        if masks and len(masks) == len(classes):
            model.attn_mask_probs.fill_(1)  # as at the beginning of training; the model is ours
            blocks = model(pixel_values, output_block_logits=True).block_logits
            recorded_blocks = list(zip(masks, classes, strict=True))
            for i, recorded_block in enumerate(recorded_blocks[:1] if rounded else recorded_blocks):
                block = blocks[i] if i < len(blocks) else (torch.empty(0), torch.empty(0))
                yield f"masked.mask_logits.{i}", block[0], recorded_block[0]
                yield f"masked.class_logits.{i}", block[1], recorded_block[1]


@dataclass(frozen=True)
class _Comparison:
    """Our tensor beside the recorded one.

    Attributes:
        max_abs, mean_abs: largest and mean absolute difference.
        spread: standard deviation of the recorded values, to judge the others by.
        failure: what is wrong, in a sentence; empty if nothing is.
    """

    max_abs: float
    mean_abs: float
    spread: float
    failure: str

    def to_dict(self) -> dict[str, float | None]:
        """The figures as JSON shows them; null for what is no number."""
        figures = {"max_abs": self.max_abs, "mean_abs": self.mean_abs, "spread": self.spread}
        return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def _compare(name: str, ours: "Tensor", theirs: "Tensor", relative: float) -> _Comparison:
    """Compares two tensors; where weights were rounded, by a share of the recorded range."""
    spread = float(theirs.float().std())
    if ours.shape != theirs.shape:
        failure = (
            f"{name} has the shape {list(ours.shape)}, recorded is the shape {list(theirs.shape)}."
        )
        return _Comparison(math.nan, math.nan, spread, failure)
    difference = (ours.double() - theirs.double()).abs()
    largest, mean = float(difference.max()), float(difference.mean())
    tolerance = max(TOLERANCE, relative * float(theirs.max() - theirs.min()))
    failure = ""
    if not largest <= tolerance:
        failure = f"{name} differs by up to {largest:.3g}, more than {tolerance:.3g}."
    return _Comparison(largest, mean, spread, failure)
