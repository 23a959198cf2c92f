"""COCO's formats for segments: id maps, run-length encoded masks, and the JSON around them.

Source: https://cocodataset.org/#format-data and, for the encoding's text, maskApi.c of
github.com/cocodataset/cocoapi.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Box: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True)
class Segment:
    """A segment of a picture.

    Attributes:
        id: its id in the picture's id map, from 1.
        category_id: the model's class id.
        area: area in pixels.
        bbox: (left, top, width, height) in pixels.
        score: from 0 to 1; None for semantic segmentation, which has no scores.
        rle: an instance's full mask, run-length encoded, including parts that other instances cover
            in the id map; None for other tasks, whose id map has all pixels.
    """

    id: int
    category_id: int
    area: int
    bbox: Box
    score: float | None = None
    rle: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The segment as an entry of COCO's JSON."""
        content: dict[str, Any] = {
            "id": self.id,
            "category_id": self.category_id,
            "area": self.area,
            "bbox": list(self.bbox),
            "iscrowd": 0,
        }
        if self.score is not None:
            content["score"] = self.score
        if self.rle is not None:
            content["segmentation"] = dict(self.rle)
        return content


def measure(id_map: NDArray[np.integer[Any]]) -> dict[int, tuple[int, Box]]:
    """Area and bounding box, as in Segment, of each id in an id map (height, width)."""
    width = id_map.shape[1]
    pixels = id_map.ravel()
    # runs of equal pixels within a row: there are far fewer of them than pixels
    begins = np.ones(pixels.size, dtype=bool)
    np.not_equal(pixels[1:], pixels[:-1], out=begins[1:])
    begins[::width] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=pixels.size)
    ids = pixels[starts]

    order = np.argsort(ids, kind="stable")  # by id, from the top down
    starts, lengths, ids = starts[order], lengths[order], ids[order]
    firsts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    lasts = np.append(firsts[1:], len(ids)) - 1
    rows, columns = starts // width, starts % width
    top, bottom = rows[firsts], rows[lasts] + 1
    left = np.minimum.reduceat(columns, firsts)
    right = np.maximum.reduceat(columns + lengths, firsts)
    areas = np.add.reduceat(lengths, firsts)
    boxes = np.stack([left, top, right - left, bottom - top], axis=-1)
    return {
        id: (area, tuple(box))
        for id, area, box in zip(ids[firsts].tolist(), areas.tolist(), boxes.tolist(), strict=True)
    }


def id_map_png(id_map: NDArray[np.unsignedinteger[Any]]) -> bytes:
    """An id map (height, width) as a PNG file: id = red + 256 green + 256² blue, 0 for no segment.

    Every row is stored as its difference from the row above, which leaves long runs of zeros.
    Pillow tries all filters on every row, which takes three times as long.
    Source: https://www.w3.org/TR/png-3/
    """
    height, width = id_map.shape
    up = 2  # the filter's number, before every row
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = up
    for channel in range(min(3, id_map.itemsize)):
        values = (id_map >> 8 * channel).astype(np.uint8)  # keeps the lowest 8 bits
        differences = rows[:, 1 + channel :: 3]
        differences[0] = values[0]
        np.subtract(values[1:], values[:-1], out=differences[1:])
    compressor = zlib.compressobj(1, strategy=zlib.Z_RLE)
    content = compressor.compress(rows.data) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of RGB, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encodes a mask (height, width) as pycocotools does: run lengths, column by column.

    Returns:
        ``size``, [height, width], and ``counts``, the run lengths as text, starting with zeros.
    """
    columns = np.flatnonzero(mask.any(axis=0))
    left, right = (columns[0], columns[-1] + 1) if columns.size else (0, 0)
    pixels = mask[:, left:right].ravel(order="F")  # the other columns are zeros
    changes = np.flatnonzero(np.diff(pixels, prepend=False, append=False)) + left * len(mask)
    lengths = np.diff(changes, prepend=0, append=mask.size).tolist()
    if lengths[-1] == 0:
        lengths.pop()
    # from the fourth on, each length is stored as its difference from the length two before it
    values = lengths[:3] + [now - then for now, then in zip(lengths[3:], lengths[1:], strict=False)]
    return {"size": list(mask.shape), "counts": "".join(map(_as_text, values))}


def _as_text(value: int) -> str:
    """A number in groups of 5 bits, the lowest first; the sixth bit means that more follow.

    The highest bit of the last group is the sign.
    """
    text = ""
    while True:
        group = value & 31
        value >>= 5
        if value == (-1 if group & 16 else 0):
            return text + chr(group + 48)
        text += chr((group | 32) + 48)


def document(
    image: Mapping[str, Any],
    segments: Sequence[Segment],
    categories: Sequence[Mapping[str, Any]],
    id_map_name: str | None,
) -> dict[str, Any]:
    """A COCO dataset of one picture.

    Args:
        image: the picture's entry in ``images``.
        segments: the picture's segments.
        categories: all classes of the model.
        id_map_name: file name of the id map for the panoptic format; None for the instance format.
    """
    entries = [segment.to_dict() for segment in segments]
    annotations: list[dict[str, Any]] = [{"image_id": image["id"], **entry} for entry in entries]
    if id_map_name is not None:
        annotations = [
            {"image_id": image["id"], "file_name": id_map_name, "segments_info": entries}
        ]
    return {"images": [dict(image)], "annotations": annotations, "categories": list(categories)}
