"""A verdict as one HTML file that asks no network for anything, to attach to a release."""

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
from converter.checks.recorded import Recorded
from converter.checks.verdict import NUMBERED, Level, Verdict
from converter.colours import Colour, class_colour
from converter.errors import OutputError
from converter.files import replacing
from converter.history import History, read_history
from converter.outside import visible
from converter.version import __version__
from converter.weights.tensorfiles import find_weights, open_tensors
from reference_model import EomtDinov3Config

_TEMPLATES = Path(__file__).parent / "templates"

# Of a recording's pictures and of a picture's segments, as many are shown.
_PICTURES = 4
_SEGMENTS = 12

# Pictures are made to fit this many pixels: twice what they are shown at.
_PICTURE_SIDE = 512

# The plot's width in percent: where zero is, which has no logarithm, and where the axis lies.
_ZERO, _AXIS_START, _AXIS_END = 2.5, 14.0, 96.0

# What may come of undoing a fault, the most telling first.
_OUTCOMES = ("explains all", "explains part", "explains nothing")

# Height of a chart's row in pixels; verdict.css has it too.
_ROW_HEIGHT = 20


@dataclass(frozen=True)
class Point:
    """The difference of one tensor.

    Attributes:
        name: of the tensor.
        max_abs, mean_abs, relative, cosine: as in `converter.checks.comparison.Comparison`; None
            for what is no number.
        tolerance: the largest difference that is none.
    """

    name: str
    max_abs: float | None
    mean_abs: float | None
    relative: float | None
    cosine: float | None
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether the difference is tolerated."""
        return self.max_abs is not None and self.max_abs <= self.tolerance


@dataclass(frozen=True)
class Chart:
    """Differences by tensor, in the network's order.

    Attributes:
        level: at which they were taken.
        beside: what the model was compared with.
        points: one for each tensor.
    """

    level: str
    beside: str
    points: tuple[Point, ...]

    @property
    def decades(self) -> range:
        """The powers of ten that the axis goes through."""
        sizes = [
            size
            for point in self.points
            for size in (point.max_abs, point.mean_abs, point.tolerance)
            if size
        ]
        low = math.floor(math.log10(min(sizes)))
        return range(low, max(math.ceil(math.log10(max(sizes))), low + 1) + 1)

    def x(self, size: float) -> float:
        """Where a difference lies, in percent of the width."""
        if size == 0:
            return _ZERO
        low, high = self.decades[0], self.decades[-1]
        share = (math.log10(size) - low) / (high - low)
        return round(_AXIS_START + share * (_AXIS_END - _AXIS_START), 2)

    @property
    def main_decades(self) -> range:
        """Those of the decades whose labels find room on a phone."""
        return self.decades[:: math.ceil(len(self.decades) / 4)]

    @property
    def worst(self) -> Point | None:
        """The tensor of the largest difference; None if none is a number."""
        known = [point for point in self.points if point.max_abs is not None]
        return max(known, key=lambda point: point.max_abs or 0.0, default=None)


@dataclass(frozen=True)
class ShownSegment:
    """The pixels that go to one query, as recorded and as the model has them.

    Attributes:
        colour: that it is drawn in, as in ``#1f77b4``.
        labels: its best class, recorded and ours.
        shares: of the picture's pixels, recorded and ours, from 0 to 1.
    """

    colour: str
    labels: tuple[str, str]
    shares: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """A recorded picture and its segments.

    Attributes:
        images: data: URIs by what they show: ``input``, ``recorded``, ``ours``, ``difference``.
        height, width: of the input in pixels.
        differing: how many of the masks' pixels go to another query than the recorded one.
        size: how many pixels the masks have.
        segments: the largest, the recorded ones first.
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
        name, shape, dtype: as in its file; of one that is missing there, as conversion.json has
            them.
        recipe: how it came about, by conversion.json; empty where that is not known.
        sha256: of its little-endian bytes; None where it is missing or was not read.
        status: what came of holding it against its recipe, or against conversion.json.
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
        name: of the file.
        sha256: its digest.
    """

    role: str
    repo_id: str | None
    revision: str | None
    name: str
    sha256: str


@dataclass(frozen=True)
class ReportData:
    """All that a report shows.

    Attributes:
        title: what the model is called.
        verdict: what is known of it.
        charts: its differences from what was recorded, and from a peer.
        pictures: the first ones that were recorded.
        tensors: every tensor of the model, and those that it should have.
        sources: what it was made from; empty if that is not known.
        versions: of the software that checked it, and of the tool that converted it, by name.
    """

    title: str
    verdict: Verdict
    charts: tuple[Chart, ...]
    pictures: tuple[Picture, ...]
    tensors: tuple[TensorRow, ...]
    sources: tuple[SourceFile, ...]
    versions: Mapping[str, str]


# what stands for an open file, which is written to and must not be replaced
_STREAMS = ("/dev/std", "/dev/fd/", "/proc/")


def write_report(
    paths: Sequence[Path],
    title: str,
    folder: Path,
    verdict: Verdict,
    recorded: Recorded | None,
    outputs: Mapping[str, Tensor],
) -> None:
    """Writes the report of a verdict on a model to every path.

    The other arguments are those of `gather`.

    Raises:
        OutputError: a file cannot be written.
        UnreadableFileError: the model's conversion.json is not as a conversion writes it.
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
    folder: Path,
    verdict: Verdict,
    recorded: Recorded | None,
    outputs: Mapping[str, Tensor],
) -> ReportData:
    """Collects what a report shows.

    Args:
        title: what the model is called.
        folder: of the model; it has been read before, so that its files are sound.
        verdict: on this model.
        recorded: what its numbers were held against, if they were.
        outputs: what it put out for the recorded input, by the names of recorded tensors; empty if
            it was not run.

    Raises:
        UnreadableFileError: the model's conversion.json is not as a conversion writes it.
    """
    history = read_history(folder)
    return ReportData(
        title=title,
        verdict=verdict,
        charts=tuple(_charts(verdict, recorded)),
        pictures=_pictures(recorded, outputs, folder) if recorded and outputs else (),
        tensors=_tensor_rows(folder, history, verdict),
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
        beside = "what was recorded" + (", before rounding" if figures.get("unrounded") else "")
        if level.level == "peers":
            beside = f"{figures['peer']} {figures['version']}"
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


def _tensor_rows(folder: Path, history: History | None, verdict: Verdict) -> tuple[TensorRow, ...]:
    figures = {level.level: level.figures for level in verdict.levels}
    digests = figures.get("structure", {}).get("digests", {})
    different = figures.get("arithmetic", {}).get("different")
    unknown: tuple[tuple[int, ...], str, str] = ((), "", "")
    told = {
        name: (row.shape, row.dtype, row.recipe)
        for name, row in (history.rows if history else {}).items()
    }
    with open_tensors(find_weights(folder)) as file:
        found = {
            name: (info.shape, info.dtype, told.get(name, unknown)[2])
            for name, info in file.tensors.items()
        }

    def status(name: str) -> TensorStatus:
        if name not in found:
            return "missing"
        if different is None:
            return "not checked"
        return "other values" if name in different else "as expected"

    return tuple(
        TensorRow(name, shape, dtype, recipe, digests.get(name), status(name))
        for name, (shape, dtype, recipe) in ({**told, **found}).items()
    )


# pictures ---------------------------------------------------------------------------------------


def _pictures(
    recorded: Recorded, outputs: Mapping[str, Tensor], folder: Path
) -> tuple[Picture, ...]:
    """The first recorded pictures; none where outputs have other shapes, or no three channels."""
    names = ("mask_logits", "class_logits")
    theirs = [recorded.tensors[name] for name in names]
    ours = [outputs[name] for name in names]
    shapes = [tensor.shape for tensor in theirs]
    if recorded.pixels.shape[1] != 3 or [tensor.shape for tensor in ours] != shapes:
        return ()
    id2label = EomtDinov3Config.from_pretrained(folder).id2label
    return tuple(
        _picture(
            recorded.pixels[i].permute(1, 2, 0).numpy(),
            _Prediction.of(theirs[0][i], theirs[1][i], id2label),
            _Prediction.of(ours[0][i], ours[1][i], id2label),
        )
        for i in range(min(_PICTURES, len(recorded.pixels)))
    )


@dataclass(frozen=True)
class _Prediction:
    """What a model makes of a picture.

    Attributes:
        queries: the query that each pixel of the masks goes to, (height, width).
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
        """How many pixels go to every query."""
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
    """A colour for each of these queries: its class's, or a variation of it."""
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
    """What an expression of the template writes; all text but our own markup is made visible."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(data: ReportData) -> str:
    """The page, the same for the same data.

    Whatever stands in the data is text, never markup, and every character of it shows.
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
    """What `--level` calls a level; None of pictures, which have no number."""
    return NUMBERED.index(level.level) + 1 if level.level in NUMBERED else None


def _csp_digest(text: str) -> str:
    """What a Content-Security-Policy calls an inline style or script that it allows."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"


def _figures(level: Level) -> list[tuple[str, str]]:
    """What was measured at a level, in words."""
    figures = level.figures
    written: Mapping[str, tuple[str, Callable[[Any], str]]] = {
        "tensors": ("tensors", "{:,}".format),
        "parameters": ("parameters", "{:,}".format),
        "dtypes": ("element types", ", ".join),
        "against": ("held against", _against),
        "different": ("other than expected", _count),
        "different_files": ("files changed since", _count),
        "pictures": ("pictures", "{:,}".format),
        "task": ("task", str),
        "max_abs": ("largest difference", _figure),
        "tolerance": ("tolerance", "{:g}".format),
        "relative_tolerance": ("or, of the range", "{:g}".format),
        "rounded_to": ("weights rounded to", str),
        "rounding_excess": ("largest error, of what rounding makes", "{:.2f} times".format),
        "best_class": ("same best class", _share),
        "mask_iou": ("mask IoU", "{:.4f}".format),
        "same_segment": ("pixels in the same segment", _share),
        "equal_pixels": ("pixels with the recorded result", _share),
        "least_equal_pixels": ("at least", _share),
        "rounded_equal_pixels": ("with rounded weights", _share),
        "recorded_sha256": ("SHA-256 of the recording", str),
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


def _count(names: list[str]) -> str:
    return f"{len(names):,}"


def _figure(size: float | None) -> str:
    return "no number" if size is None else f"{size:.2g}"


def _share(share: float) -> str:
    """A share in percent; 0 where it is none and 100 where it is all, and nowhere else."""
    if share in (0, 1):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.001 else f"{math.floor(share * 1000) / 10:.1f}%"


def _power(exponent: int) -> str:
    superscripts = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"10{str(exponent).translate(superscripts)}"
