"""Writes a verdict as one HTML file that loads nothing from the network."""

import base64
import hashlib
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from converter.checks.comparison import Tolerance, segments
from converter.checks.computation import Computation
from converter.checks.recorded import Recorded, class_names
from converter.checks.verdict import NUMBERED, Level, Verdict
from converter.colours import Colour, class_colour
from converter.errors import OutputError
from converter.files import replacing
from converter.history import History, read_history
from converter.outside import visible
from converter.version import __version__
from reference_model import EomtDinov3Config

_TEMPLATES = Path(__file__).parent / "templates"

# the largest number of pictures shown, and of segments listed for each
_PICTURES = 4
_SEGMENTS = 12

# the longer side of pictures in pixels: twice the size at which they are shown
_PICTURE_SIDE = 512

# Positions in percent of the plot's width: of zero, which a logarithmic axis does not have, and of
# the axis.
_ZERO, _AXIS_START, _AXIS_END = 2.5, 14.0, 96.0

# the possible results of undoing a fault, the most important first
_OUTCOMES = ("explains all", "explains part", "explains nothing")

# height of a chart's row in pixels; must be the same in verdict.css
_ROW_HEIGHT = 20


@dataclass(frozen=True)
class Point:
    """The difference of one tensor.

    Attributes:
        name: name of the tensor.
        max_abs, mean_abs, relative, cosine: as in `converter.checks.comparison.Comparison`; None
            for NaN and infinity.
        tolerance: the largest difference that is allowed.
    """

    name: str
    max_abs: float | None
    mean_abs: float | None
    relative: float | None
    cosine: float | None
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.max_abs is not None and self.max_abs <= self.tolerance


@dataclass(frozen=True)
class Chart:
    """Differences by tensor, in the network's order.

    Attributes:
        level: the level that they belong to.
        beside: what the model was compared with, in words.
        points: one for each tensor.
    """

    level: str
    beside: str
    points: tuple[Point, ...]

    @property
    def decades(self) -> range:
        """The powers of ten (their exponents) on the axis."""
        sizes = [
            size
            for point in self.points
            for size in (point.max_abs, point.mean_abs, point.tolerance)
            if size
        ]
        low = math.floor(math.log10(min(sizes)))
        return range(low, max(math.ceil(math.log10(max(sizes))), low + 1) + 1)

    def x(self, size: float) -> float:
        """The position of a difference, in percent of the width."""
        if size == 0:
            return _ZERO
        low, high = self.decades[0], self.decades[-1]
        share = (math.log10(size) - low) / (high - low)
        return round(_AXIS_START + share * (_AXIS_END - _AXIS_START), 2)

    @property
    def main_decades(self) -> range:
        """The decades whose labels have enough room on a phone."""
        return self.decades[:: math.ceil(len(self.decades) / 4)]

    @property
    def worst(self) -> Point | None:
        """The tensor with the largest difference; None if all are NaN or infinite."""
        known = [point for point in self.points if point.max_abs is not None]
        return max(known, key=lambda point: point.max_abs or 0.0, default=None)


@dataclass(frozen=True)
class ShownSegment:
    """The pixels assigned to one query, in the recording and by the model.

    Attributes:
        colour: its colour, such as ``#1f77b4``.
        labels: its best class, recorded and ours.
        shares: its share of the picture's pixels, recorded and ours, from 0 to 1.
    """

    colour: str
    labels: tuple[str, str]
    shares: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """A recorded picture and its segments.

    Attributes:
        images: data URIs of ``input``, ``recorded``, ``ours`` and ``difference``.
        height, width: size of the input in pixels.
        differing: number of mask pixels that are not assigned to the recorded query.
        size: number of mask pixels.
        segments: the largest segments, the recorded ones first.
    """

    images: Mapping[str, Markup]
    height: int
    width: int
    differing: int
    size: int
    segments: tuple[ShownSegment, ...]


TensorStatus = Literal["as expected", "other values", "missing", "not checked"]


@dataclass(frozen=True)
class TensorRow:
    """A tensor of the model.

    Attributes:
        name, shape, dtype: as in its file, or as in conversion.json if the tensor is missing.
        recipe: how it was made, by conversion.json; empty if unknown.
        sha256: digest of its little-endian bytes; None if it is missing or was not read.
        status: result of comparing it with its recipe or with conversion.json.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    recipe: str
    sha256: str | None
    status: TensorStatus


@dataclass(frozen=True)
class SourceFile:
    """A file that the model was made from, by conversion.json.

    Attributes:
        role: ``backbone``, ``delta`` or ``weights``.
        repo_id, revision: where it came from; None for a local file.
        name: name of the file.
        sha256: its digest.
    """

    role: str
    repo_id: str | None
    revision: str | None
    name: str
    sha256: str


@dataclass(frozen=True)
class ReportData:
    """The content of a report.

    Attributes:
        title: the name of the model, or of the file of outputs.
        verdict: the verdict on it.
        charts: its differences from the recording, and from a peer.
        pictures: the first recorded pictures.
        tensors: every tensor that the model has or should have; empty for outputs.
        sources: the files it was made from; empty if unknown, and for outputs.
        versions: versions of the software that checked and that converted it, by name.
    """

    title: str
    verdict: Verdict
    charts: tuple[Chart, ...]
    pictures: tuple[Picture, ...]
    tensors: tuple[TensorRow, ...]
    sources: tuple[SourceFile, ...]
    versions: Mapping[str, str]


# paths of open files, which are written to and must not be replaced
_STREAMS = ("/dev/std", "/dev/fd/", "/proc/")


def write_report(
    paths: Sequence[Path],
    title: str,
    folder: Path | None,
    verdict: Verdict,
    recorded: Recorded | None,
    outputs: Mapping[str, Tensor],
) -> None:
    """Writes the report of a verdict to every path.

    The other arguments are those of `gather`.

    Raises:
        OutputError: a file cannot be written.
        UnreadableFileError: the model's conversion.json is malformed.
    """
    content = render(gather(title, folder, verdict, recorded, outputs)).encode()
    for path in paths:
        try:
            if str(path).startswith(_STREAMS) or (path.exists() and not path.is_file()):
                path.write_bytes(content)
            else:
                with replacing(path) as file:
                    file.write(content)
        except OSError as error:
            raise OutputError(
                f"The report cannot be written to {path}: {error.strerror}.",
                "Give a file in a folder that exists and may be written to.",
            ) from error


# what is shown ----------------------------------------------------------------------------------


def gather(
    title: str,
    folder: Path | None,
    verdict: Verdict,
    recorded: Recorded | None,
    outputs: Mapping[str, Tensor],
) -> ReportData:
    """Collects what a report shows.

    Args:
        title: the name of the model, or of the file of outputs.
        folder: the model's folder; its files have been read, and checked, before. None if only
            outputs were checked.
        verdict: the verdict on this model, or on these outputs.
        recorded: the recording that its numbers were compared with, if any.
        outputs: its outputs for the recorded input, by the names of recorded tensors; empty if it
            was not run.

    Raises:
        UnreadableFileError: the model's conversion.json is malformed.
    """
    history = read_history(folder) if folder else None
    return ReportData(
        title=title,
        verdict=verdict,
        charts=tuple(_charts(verdict, recorded)),
        pictures=_pictures(recorded, outputs, folder) if recorded and outputs else (),
        tensors=_tensor_rows(history, verdict),
        sources=tuple(
            SourceFile(role, source.repo_id, source.revision, name, file.sha256)
            for role, source in (history.sources if history else {}).items()
            for name, file in source.files.items()
        ),
        versions={
            "checked with": f"eomt-convert {__version__}, torch {version('torch')}",
            **({"converted with": f"{history.tool} {history.version}"} if history else {}),
        },
    )


def _charts(verdict: Verdict, recorded: Recorded | None) -> Iterator[Chart]:
    for level in verdict.levels:
        if level.level not in ("numbers", "peers") or not level.figures.get("compared"):
            continue
        figures = level.figures
        beside = "the recording" + (", before rounding" if figures.get("unrounded") else "")
        if level.level == "peers":
            beside = f"{figures['peer']} {figures['version']}"
        elif "beside" in figures:
            compared = "the recording" if figures["beside"] == "recording" else "the same weights"
            how = Computation(figures.get("computed_in", "float32"), figures.get("compiled"))
            beside = f"{compared}, {how}"
        tolerance = Tolerance(figures["tolerance"], figures["relative_tolerance"])
        theirs, widened = recorded.tensors if recorded else {}, figures.get("widened", {})
        points = (
            Point(
                name=name,
                max_abs=compared["max_abs"],
                mean_abs=compared["mean_abs"],
                relative=compared["relative"],
                cosine=compared["cosine"],
                tolerance=widened.get(name, 1.0)
                * (tolerance.of(theirs[name]) if name in theirs else tolerance.absolute),
            )
            for name, compared in figures["compared"].items()
        )
        yield Chart(level.level, beside, tuple(points))


def _tensor_rows(history: History | None, verdict: Verdict) -> tuple[TensorRow, ...]:
    figures = {level.level: level.figures for level in verdict.levels}
    structure = figures.get("structure", {})
    digests = structure.get("digests", {})
    different = figures.get("arithmetic", {}).get("different")
    unknown: tuple[tuple[int, ...], str, str] = ((), "", "")
    planned = {
        name: (row.shape, row.dtype, row.recipe)
        for name, row in (history.rows if history else {}).items()
    }
    found = {
        name: (tuple(stored["shape"]), stored["dtype"], planned.get(name, unknown)[2])
        for name, stored in structure.get("stored", {}).items()
    }

    def status(name: str) -> TensorStatus:
        if name not in found:
            return "missing"
        if different is None:
            return "not checked"
        return "other values" if name in different else "as expected"

    return tuple(
        TensorRow(name, shape, dtype, recipe, digests.get(name), status(name))
        for name, (shape, dtype, recipe) in ({**planned, **found}).items()
    )


# pictures ---------------------------------------------------------------------------------------


def _pictures(
    recorded: Recorded, outputs: Mapping[str, Tensor], folder: Path | None
) -> tuple[Picture, ...]:
    """The first recorded pictures; none if shapes differ, or if they do not have three channels."""
    names = ("mask_logits", "class_logits")
    theirs = [recorded.tensors[name] for name in names]
    ours = [outputs[name] for name in names]
    shapes = [tensor.shape for tensor in theirs]
    if recorded.pixels.shape[1] != 3 or [tensor.shape for tensor in ours] != shapes:
        return ()
    if folder:
        labels = EomtDinov3Config.from_pretrained(folder).id2label
    else:
        labels = dict(enumerate(class_names(recorded)))
    return tuple(
        _picture(
            recorded.pixels[i].permute(1, 2, 0).numpy(),
            _Prediction.of(theirs[0][i], theirs[1][i], labels),
            _Prediction.of(ours[0][i], ours[1][i], labels),
        )
        for i in range(min(_PICTURES, len(recorded.pixels)))
    )


@dataclass(frozen=True)
class _Prediction:
    """A model's prediction for a picture.

    Attributes:
        queries: the query that each mask pixel is assigned to, (height, width).
        classes, labels: the best class of every query, and its name.
    """

    queries: NDArray[np.int64]
    classes: list[int]
    labels: list[str]

    @classmethod
    def of(cls, masks: Tensor, classes: Tensor, id2label: Mapping[int, str]) -> Self:
        """From logits (queries, height, width) and (queries, classes + 1)."""
        best = classes[:, :-1].argmax(-1).tolist()
        queries = segments(masks[None], classes[None])[0].numpy()
        return cls(queries, best, [id2label[number] for number in best])

    @property
    def areas(self) -> NDArray[np.int64]:
        """The number of pixels assigned to every query."""
        return np.bincount(self.queries.flatten(), minlength=len(self.labels))


def _picture(pixels: NDArray[np.uint8], theirs: _Prediction, ours: _Prediction) -> Picture:
    """Draws one picture, (height, width, 3)."""
    areas = theirs.areas, ours.areas
    used = np.flatnonzero(areas[0] + areas[1])
    ranked = used[np.lexsort((-areas[1][used], -areas[0][used]))].tolist()
    colours = _colours(ranked, theirs.classes)
    shown = Image.fromarray(pixels)
    shown.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    differing = theirs.queries != ours.queries
    return Picture(
        images={
            "input": _data_uri(shown),
            "recorded": _data_uri(_segment_map(theirs.queries, colours)),
            "ours": _data_uri(_segment_map(ours.queries, colours)),
            "difference": _data_uri(_difference(shown, differing)),
        },
        height=pixels.shape[0],
        width=pixels.shape[1],
        differing=int(differing.sum()),
        size=differing.size,
        segments=tuple(
            ShownSegment(
                "#{:02x}{:02x}{:02x}".format(*colours[query]),
                (theirs.labels[query], ours.labels[query]),
                (areas[0][query] / differing.size, areas[1][query] / differing.size),
            )
            for query in ranked[:_SEGMENTS]
        ),
    )


def _colours(ranked: list[int], classes: list[int]) -> dict[int, Colour]:
    """A colour for each of these queries: that of its class, or a variation of it."""
    instances: Counter[int] = Counter()
    colours = {}
    for query in ranked:
        colours[query] = class_colour(classes[query], instances[classes[query]])
        instances[classes[query]] += 1
    return colours


def _segment_map(queries: NDArray[np.int64], colours: Mapping[int, Colour]) -> Image.Image:
    drawn = np.zeros((*queries.shape, 3), np.uint8)
    for query, colour in colours.items():
        drawn[queries == query] = colour
    return Image.fromarray(drawn)


def _difference(picture: Image.Image, differing: NDArray[np.bool_]) -> Image.Image:
    """The picture, pale, with what differs in red."""
    grey = picture.convert("L").convert("RGB")
    pale = Image.blend(grey, Image.new("RGB", picture.size, "white"), 0.6)
    mask = Image.fromarray(differing.astype(np.uint8) * 255).resize(
        picture.size, Image.Resampling.NEAREST
    )
    pale.paste((208, 32, 48), mask=mask)
    return pale


def _data_uri(image: Image.Image) -> Markup:
    file = io.BytesIO()
    image.save(file, "PNG")
    return Markup("data:image/png;base64,{}").format(base64.b64encode(file.getvalue()).decode())


# the page ---------------------------------------------------------------------------------------


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"figure": _figure, "share": _share, "power": _power}
    return environment.get_template("verdict.html")


def _shown(value: Any) -> Any:
    """Makes control characters visible in text that the template writes, except our markup."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(data: ReportData) -> str:
    """The page; the same data gives the same page.

    All data is shown as text, never as markup, with every character visible.
    """
    not_tried: dict[str, list[str]] = {}
    for trial in data.verdict.tried:
        if trial.status == "not tried":
            not_tried.setdefault(trial.reason, []).append(trial.name)
    style, script = (
        (_TEMPLATES / name).read_text(encoding="utf-8") for name in ("verdict.css", "verdict.js")
    )
    return _template().render(
        data=data,
        levels=[(_number(level), level, _figures(level)) for level in data.verdict.levels],
        tried=sorted(
            (trial for trial in data.verdict.tried if trial.status != "not tried"),
            key=lambda trial: _OUTCOMES.index(trial.status),
        ),
        not_tried=not_tried,
        row_height=_ROW_HEIGHT,
        style=Markup(style),  # noqa: S704, ours
        script=Markup(script),  # noqa: S704, ours
        style_digest=_csp_digest(style),
        script_digest=_csp_digest(script),
    )


def _number(level: Level) -> int | None:
    """The level's number for `--level`; None for pictures, which have none."""
    return NUMBERED.index(level.level) + 1 if level.level in NUMBERED else None


def _csp_digest(text: str) -> str:
    """The digest that allows an inline style or script in a Content-Security-Policy."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"


def _figures(level: Level) -> list[tuple[str, str]]:
    """What was measured at a level, in words."""
    figures = level.figures
    written: Mapping[str, tuple[str, Callable[[Any], str]]] = {
        "opset": ("opset", str),
        "inputs": ("input", _ports),
        "outputs": ("outputs", _ports),
        "tensors": ("tensors", "{:,}".format),
        "parameters": ("parameters", "{:,}".format),
        "dtypes": ("element types", ", ".join),
        "against": ("compared with", _against),
        "different": ("different from expected", _count),
        "different_files": ("files changed since", _count),
        "pictures": ("pictures", "{:,}".format),
        "task": ("task", str),
        "max_abs": ("largest difference", _figure),
        "tolerance": ("tolerance", "{:g}".format),
        "relative_tolerance": ("or, as a share of the range", "{:g}".format),
        "rounded_to": ("weights rounded to", str),
        "computed_in": ("computed in", str),
        "recorded_in": ("recording computed in", str),
        "rounding_excess": ("largest error, relative to rounding", "{:.2f} times".format),
        "best_class": ("same best class", _share),
        "mask_iou": ("mask IoU", "{:.4f}".format),
        "same_segment": ("pixels in the same segment", _share),
        "equal_pixels": ("pixels with the recorded result", _share),
        "least_equal_pixels": ("at least", _share),
        "rounded_equal_pixels": ("with rounded weights", _share),
        "providers": ("nodes by execution provider", _nodes),
        "recorded_sha256": ("SHA-256 of the recording", str),
        "outputs_sha256": ("SHA-256 of the file of outputs", str),
    }
    shown = [
        (name, write(figures[key]))
        for key, (name, write) in written.items()
        if figures.get(key) not in (None, [])
    ]
    if level.level == "published":
        shown += [
            (f"largest difference in {name}", _figure(compared["max_abs"]))
            for name, compared in figures.get("compared", {}).items()
        ]
    return shown


def _against(name: str) -> str:
    return "their sources" if name == "sources" else name


def _ports(ports: Any) -> str:
    """Inputs or outputs of an exported file, with their shapes; those of numbers are not named."""
    if not isinstance(ports, dict):
        return "; ".join("×".join(map(str, shape)) for shape in ports)
    return ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in ports.items())


def _nodes(providers: Mapping[str, Any]) -> str:
    asked = ", ".join(providers["asked"])
    nodes = ", ".join(f"{name} {count:,}" for name, count in providers["nodes"].items())
    return (nodes or "none were counted") + (f" (asked for: {asked})" if asked else "")


def _count(names: list[str]) -> str:
    return f"{len(names):,}"


def _figure(size: float | None) -> str:
    return "not a number" if size is None else f"{size:.2g}"


def _share(share: float) -> str:
    """A share in percent; 0% and 100% only for exactly none and all."""
    if share in (0, 1):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.001 else f"{math.floor(share * 1000) / 10:.1f}%"


def _power(exponent: int) -> str:
    superscripts = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"10{str(exponent).translate(superscripts)}"
