"""Draws segments on a picture, with a legend."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from converter.colours import Colour, class_colour


@dataclass(frozen=True)
class Label:
    """What the legend shows for a segment.

    Attributes:
        segment_id: its id in the id map, from 1.
        class_id: its class id, which decides its colour.
        name: name of its class.
        note: a few characters, such as its score.
    """

    segment_id: int
    class_id: int
    name: str
    note: str


def draw_overlay(
    picture: Image.Image, id_map: NDArray[np.integer[Any]], labels: Sequence[Label]
) -> Image.Image:
    """Draws a picture with its segments coloured and outlined, and a legend beside or below it.

    Small pictures are enlarged by a whole number, so that the legend stays in proportion.

    Args:
        picture: RGB.
        id_map: (height, width), the segment id of every pixel; 0 for no segment.
        labels: one for each segment; the first one of a class gets the colour of the class.
    """
    factor = max(1, _MIN_SIDE // max(picture.size))
    grey = picture.convert("L")  # on grey, colours look as in the legend
    if factor > 1:
        size = picture.width * factor, picture.height * factor
        grey = grey.resize(size, Image.Resampling.NEAREST)
        id_map = id_map.repeat(factor, axis=0).repeat(factor, axis=1)
    colours = _segment_colours(labels)
    drawn = _coloured(np.asarray(grey), id_map, colours)
    return _with_legend(drawn, labels, colours)


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

_MIN_SIDE = 512  # pixels; pictures are enlarged until their longer side is about that
_OPACITY = 0.55


# on the lines between segments: white with dark edges, visible on any background
_LINE, _EDGE = (255, 255, 255), (20, 20, 20)


def _coloured(
    grey: NDArray[np.uint8], id_map: NDArray[np.integer[Any]], colours: Mapping[int, Colour]
) -> Image.Image:
    """A grey picture (height, width) with its segments coloured and outlined.

    A pixel's colour follows from its row in a table of colours, and from how bright it is.
    """
    count = 1 + max(colours, default=0)
    fill = np.zeros((count, 1, 3), dtype=np.uint8)
    for segment_id, colour in colours.items():
        fill[segment_id] = colour
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
    backgrounds, fills = (
        Image.fromarray(np.broadcast_to(part, (count, 256, 3)).copy()) for part in (ramp, fill)
    )
    table = np.full((count + 2, 256, 4), 255, dtype=np.uint8)  # the fourth byte is not used
    table[:count, :, :3] = np.asarray(Image.blend(backgrounds, fills, _OPACITY))
    table[0, :, :3] = ramp[0]
    table[count, :, :3], table[count + 1, :, :3] = _EDGE, _LINE

    border = _border(id_map)
    radius = max(grey.shape) // 1000
    line = _widened(border, radius)
    rows = id_map.astype(np.min_scalar_type(count + 1))
    np.copyto(rows, count, where=_widened(line, max(1, radius)))
    np.copyto(rows, count + 1, where=line)
    indices = np.multiply(rows, 256, dtype=np.intp)
    indices += grey
    pixels = table.view(np.uint32).take(indices)
    height, width = grey.shape
    return Image.frombuffer("RGB", (width, height), pixels, "raw", "RGBX", 0, 1)


def _border(id_map: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """The pixels that differ from the one to the left or above."""
    border = np.zeros(id_map.shape, dtype=bool)
    border[1:] |= id_map[1:] != id_map[:-1]
    border[:, 1:] |= id_map[:, 1:] != id_map[:, :-1]
    return border


def _widened(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """A mask grown by ``radius`` pixels on all sides."""
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
_MAX_NAME_WIDTH = 14  # width in ems (font sizes)
_MAX_LETTERS = 80  # more letters never fit in that width
_MAX_IN_ROW = 8  # segments


@dataclass(frozen=True)
class _Legend:
    """The content of a legend, and its sizes in pixels.

    Attributes:
        classes: names and segments of the classes.
        font: the font of all text.
        em: the font's size.
        name_width: width of the widest class name.
        note_width: width of the coloured tag around a note.
    """

    classes: Sequence[tuple[str, tuple[Label, ...]]]
    font: _Font
    em: int
    name_width: int
    note_width: int

    @property
    def line(self) -> int:
        """Distance from one row to the next."""
        return round(1.6 * self.em)

    @property
    def gap(self) -> int:
        return round(0.6 * self.em)

    @property
    def pitch(self) -> int:
        """Distance from one tag to the next."""
        return self.note_width + self.gap // 2


@dataclass(frozen=True)
class _Row:
    """A row of the legend: segments of a class; only its first row shows the class name."""

    name: str
    is_first: bool
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class _Table:
    """The rows of a legend, arranged in columns. Sizes in pixels."""

    rows: tuple[_Row, ...]
    rows_per_column: int
    column_width: int

    @property
    def width(self) -> int:
        return math.ceil(len(self.rows) / self.rows_per_column) * self.column_width


def _with_legend(
    picture: Image.Image, labels: Sequence[Label], colours: Mapping[int, Colour]
) -> Image.Image:
    """The picture on a larger canvas, with the legend below if it is wide, else beside it."""
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
    """The table that enlarges a picture of this size (width, height) least."""
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
    return min((arrange(per_row) for per_row in range(min(most, _MAX_IN_ROW), 0, -1)), key=added)


def _classes(labels: Sequence[Label], font: _Font) -> list[tuple[str, tuple[Label, ...]]]:
    """Names and segments of the classes, in the order of their ids."""
    width = _MAX_NAME_WIDTH * font.getlength("m")
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
    """A class name in ASCII, because Pillow's default font has no other characters."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in " ".join(plain.split()))
    return text if any(c.isalnum() for c in text) else f"class {class_id}"


def _shortened(text: str, font: _Font, width: float) -> str:
    text = text[:_MAX_LETTERS]
    if font.getlength(text) <= width:
        return text
    while font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip(' ,')}…"


def _ink_on(colour: Colour) -> Colour:
    """Black or white, whichever is easier to read on a colour (by luma, ITU-R BT.601)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (255, 255, 255)
