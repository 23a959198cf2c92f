"""Segments drawn for people: colours, the overlay with its legend, and id maps as PNG."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Colours are points (lightness, a, b) of OKLab, where equal distances look equally large.
# Björn Ottosson, "A perceptual color space for image processing", 2020.
_LMS_FROM_OKLAB = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_LINEAR_RGB_FROM_LMS = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


Colour: TypeAlias = tuple[int, int, int]  # red, green, blue, from 0 to 255


@dataclass(frozen=True)
class Label:
    """What the overlay says of a segment.

    Attributes:
        segment_id: its id in the id map, from 1.
        class_id: decides its colour.
        name: of its class.
        note: a few characters, such as its score.
    """

    segment_id: int
    class_id: int
    name: str
    note: str


def class_colour(class_id: int, instance: int = 0) -> Colour:
    """A class's colour, the same in every picture; instances from 1 on get variations of it."""
    lightness, a, b = _palette()[class_id % _PALETTE_SIZE]
    # steps of irrational length: any number of instances spreads evenly
    lightness += _LIGHTNESS_RANGE * _centred(instance * _GOLDEN)
    turn = _HUE_RANGE * _centred(instance * math.sqrt(2))
    cos, sin = math.cos(turn), math.sin(turn)
    red, green, blue = _to_rgb(np.array([lightness, a * cos - b * sin, a * sin + b * cos])).tolist()
    return red, green, blue


def draw_overlay(
    picture: Image.Image, id_map: NDArray[np.integer[Any]], labels: Sequence[Label]
) -> Image.Image:
    """A picture with its segments coloured and outlined, and a legend beside or below it.

    Tiny pictures are enlarged by a whole number, so that the legend stays in proportion.

    Args:
        picture: RGB.
        id_map: (height, width), the segment of every pixel; 0 where there is none.
        labels: one for each segment; the first one of a class gets the class's own colour.
    """
    factor = max(1, _LEAST_SIDE // max(picture.size))
    picture = picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )
    id_map = id_map.repeat(factor, axis=0).repeat(factor, axis=1)
    colours = _segment_colours(labels)
    table = np.zeros((1 + max(colours, default=0), 3), dtype=np.uint8)
    for segment_id, colour in colours.items():
        table[segment_id] = colour
    drawn = picture.convert("L").convert("RGB")  # where a colour looks as it does in the legend
    fill = Image.blend(drawn, Image.fromarray(table[id_map]), _OPACITY)
    drawn.paste(fill, mask=Image.fromarray(id_map > 0))
    _draw_outlines(drawn, id_map)
    return _with_legend(drawn, labels, colours)


# colours ----------------------------------------------------------------------------------------


_PALETTE_SIZE = 256  # classes beyond share colours with earlier ones
_LIGHTNESS_RANGE, _HUE_RANGE = 0.24, 0.7  # of a class's instances; the hue's in radians
_WEIGHTS = (0.5, 1, 1)  # of OKLab's axes: the picture's own lightness shows through
_GOLDEN = (math.sqrt(5) - 1) / 2


@cache
def _palette() -> NDArray[np.float64]:
    """Colours (colours, 3) in OKLab, each as far as can be from all before it.

    Source: Glasbey, van der Heijden, Toh, Gray, "Colour displays for categorical images", 2007.
    Very dark, very light and greyish colours are left out.
    """
    grid = np.meshgrid(
        np.linspace(0.54, 0.84, 12), np.linspace(0.11, 0.22, 6), np.arange(72) * math.tau / 72
    )
    lightness, chroma, hue = (values.ravel() for values in grid)
    candidates = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    linear = _to_linear_rgb(candidates)
    candidates = candidates[((linear >= 0) & (linear <= 1)).all(axis=-1)]

    chosen = [np.array([0.62, 0.19, 0.1])]  # a red
    distances = np.full(len(candidates), np.inf)
    while len(chosen) < _PALETTE_SIZE:
        differences = (candidates - chosen[-1]) * _WEIGHTS
        distances = np.minimum(distances, (differences**2).sum(axis=-1))
        chosen.append(candidates[distances.argmax()])
    return np.array(chosen)


def _to_linear_rgb(oklab: NDArray[np.float64]) -> NDArray[np.float64]:
    linear: NDArray[np.float64] = (oklab @ _LMS_FROM_OKLAB.T) ** 3 @ _LINEAR_RGB_FROM_LMS.T
    return linear


def _to_rgb(oklab: NDArray[np.float64]) -> NDArray[np.uint8]:
    """SRGB (IEC 61966-2-1) of a colour in OKLab."""
    linear = _to_linear_rgb(oklab).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded).round().astype(np.uint8)


def _centred(turns: float) -> float:
    """The fractional part, from -0.5 to 0.5, and 0 for 0."""
    return (turns + 0.5) % 1 - 0.5


def _segment_colours(labels: Sequence[Label]) -> dict[int, Colour]:
    """The colour of every segment, by id."""
    instances: dict[int, int] = {}
    colours = {}
    for label in labels:
        instance = instances.get(label.class_id, 0)
        instances[label.class_id] = instance + 1
        colours[label.segment_id] = class_colour(label.class_id, instance)
    return colours


# overlay ----------------------------------------------------------------------------------------

_LEAST_SIDE = 512  # the longer side of an overlay's picture, in pixels, or not much below
_OPACITY = 0.55


def _draw_outlines(picture: Image.Image, id_map: NDArray[np.integer[Any]]) -> None:
    """Draws light lines with dark edges, which show on any background, between the segments."""
    border = np.zeros(id_map.shape, dtype=bool)
    border[1:] |= id_map[1:] != id_map[:-1]
    border[:, 1:] |= id_map[:, 1:] != id_map[:, :-1]
    radius = max(picture.size) // 1000
    edge = _widened(border, radius + max(1, radius))
    picture.paste((20, 20, 20), mask=Image.fromarray(edge))
    picture.paste((255, 255, 255), mask=Image.fromarray(_widened(border, radius)))


def _widened(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """A mask grown by so many pixels to all sides."""
    for axis in range(2):
        for _ in range(radius):
            grown = np.moveaxis(mask.copy(), axis, 0)
            source = np.moveaxis(mask, axis, 0)
            grown[1:] |= source[:-1]
            grown[:-1] |= source[1:]
            mask = np.moveaxis(grown, 0, axis)
    return mask


# legend -----------------------------------------------------------------------------------------

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

_BACKGROUND, _INK = (255, 255, 255), (32, 32, 32)
_LONGEST_NAME = 14  # in ems, the font's size
_MOST_LETTERS = 80  # more than that fit in no such width
_MOST_IN_ROW = 8  # segments


@dataclass(frozen=True)
class _Legend:
    """What a legend has to show, and how large that is in pixels.

    Attributes:
        classes: names and segments of the classes.
        font: of all text.
        em: the font's size.
        name_width: of the widest class name.
        note_width: of a note's coloured tag.
    """

    classes: Sequence[tuple[str, tuple[Label, ...]]]
    font: _Font
    em: int
    name_width: int
    note_width: int

    @property
    def line(self) -> int:
        """From one row to the next."""
        return round(1.6 * self.em)

    @property
    def gap(self) -> int:
        return round(0.6 * self.em)

    @property
    def pitch(self) -> int:
        """From one tag to the next."""
        return self.note_width + self.gap // 2


@dataclass(frozen=True)
class _Row:
    """A line of the legend: some segments of a class, with its name where they are the first."""

    name: str
    is_first: bool
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class _Table:
    """Rows in columns side by side. Sizes in pixels."""

    rows: tuple[_Row, ...]
    rows_per_column: int
    column_width: int

    @property
    def width(self) -> int:
        return math.ceil(len(self.rows) / self.rows_per_column) * self.column_width


def _with_legend(
    picture: Image.Image, labels: Sequence[Label], colours: Mapping[int, Colour]
) -> Image.Image:
    """The picture on a larger canvas, its legend below a landscape and beside any other picture."""
    legend = _measured(labels, em=max(15, max(picture.size) // 64))
    below = picture.width > picture.height
    table = _arranged(legend, picture.size, below=below)
    left, top = (0, picture.height) if below else (picture.width, 0)
    width = max(picture.width, left + table.width)
    height = max(picture.height, top + table.rows_per_column * legend.line + 2 * legend.gap)
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    canvas.paste(picture)

    draw = ImageDraw.Draw(canvas)
    tag = _rounded((legend.note_width, round(1.35 * legend.em)), legend.em // 3)
    for index, row in enumerate(table.rows):
        column, place = divmod(index, table.rows_per_column)
        x = left + legend.gap + column * table.column_width
        y = top + legend.gap + place * legend.line + legend.line // 2
        if row.is_first or place == 0:
            draw.text((x, y), row.name, _INK, legend.font, anchor="lm")
        x += legend.name_width + legend.gap
        for label in row.labels:
            colour = colours[label.segment_id]
            canvas.paste(colour, (x, y - tag.height // 2), tag)
            middle = (x + tag.width / 2, y)
            draw.text(middle, label.note, _ink_on(colour), legend.font, anchor="mm")
            x += legend.pitch
    return canvas


def _measured(labels: Sequence[Label], *, em: int) -> _Legend:
    font = ImageFont.load_default(em)
    classes = _classes(labels, font)
    name_width = max(math.ceil(font.getlength(name)) for name, _ in classes)
    note_width = max((math.ceil(font.getlength(label.note)) for label in labels), default=0)
    return _Legend(classes, font, em, name_width, note_width + em)


def _arranged(legend: _Legend, size: tuple[int, int], *, below: bool) -> _Table:
    """The table that adds least to a picture of this size (width, height)."""
    width, height = size

    def arrange(per_row: int) -> _Table:
        rows = _rows(legend.classes, per_row)
        column_width = legend.name_width + per_row * legend.pitch + 3 * legend.gap
        if below:
            columns = max(1, width // column_width)
            return _Table(rows, math.ceil(len(rows) / columns), column_width)
        return _Table(rows, max(1, (height - 2 * legend.gap) // legend.line), column_width)

    def added(table: _Table) -> tuple[bool, int]:
        return (table.width > width, table.rows_per_column) if below else (False, table.width)

    most = max(1, *(len(members) for _, members in legend.classes))
    return min((arrange(per_row) for per_row in range(min(most, _MOST_IN_ROW), 0, -1)), key=added)


def _classes(labels: Sequence[Label], font: _Font) -> list[tuple[str, tuple[Label, ...]]]:
    """Names and segments of the classes, in the order of their ids."""
    width = _LONGEST_NAME * font.getlength("m")
    by_class = groupby(sorted(labels, key=_class_id), key=_class_id)
    classes = []
    for class_id, group in by_class:
        members = tuple(group)
        classes.append((_shortened(_drawable(members[0].name, class_id), font, width), members))
    return classes or [("no segments", ())]


def _class_id(label: Label) -> int:
    return label.class_id


def _rows(classes: Sequence[tuple[str, tuple[Label, ...]]], per_row: int) -> tuple[_Row, ...]:
    return tuple(
        _Row(name, start == 0, members[start : start + per_row])
        for name, members in classes
        for start in range(0, max(1, len(members)), per_row)
    )


def _rounded(size: tuple[int, int], radius: int) -> Image.Image:
    """A mask of a rectangle with rounded corners, with smooth edges."""
    width, height = size
    scale = 4
    large = Image.new("L", (width * scale, height * scale))
    box = (0, 0, large.width - 1, large.height - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, radius * scale, fill=255)
    return large.resize(size, Image.Resampling.BOX)


def _drawable(name: str, class_id: int) -> str:
    """A class name in the characters that Pillow's own font has, which are those of ASCII."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in " ".join(plain.split()))
    return text if any(c.isalnum() for c in text) else f"class {class_id}"


def _shortened(text: str, font: _Font, width: float) -> str:
    text = text[:_MOST_LETTERS]
    if font.getlength(text) <= width:
        return text
    while font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip(' ,')}…"


def _ink_on(colour: Colour) -> Colour:
    """Black or white, whichever is easier to read on a colour (ITU-R BT.601's luma)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (255, 255, 255)
