"""COCO's formats for segments: id maps, run-length encoded masks, and the JSON around them.

Source: https://cocodataset.org/#format-data and, for the encoding's text, maskApi.c of
github.com/cocodataset/cocoapi.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


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
    bbox: tuple[int, int, int, int]
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


def measure(mask: NDArray[np.bool_]) -> tuple[int, tuple[int, int, int, int]]:
    """Area and bounding box of a mask (height, width), as in Segment; zeros if it is empty."""
    area = int(np.count_nonzero(mask))
    if area == 0:
        return 0, (0, 0, 0, 0)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return area, (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)


def id_map_image(id_map: NDArray[np.integer[Any]]) -> Image.Image:
    """An id map (height, width) as RGB: id = red + 256 green + 256² blue, 0 for no segment."""
    # converting to uint8 keeps the lowest 8 bits; an int64 map would take eight times the memory
    bytes_of_ids = [(id_map >> shift).astype(np.uint8) for shift in (0, 8, 16)]
    return Image.fromarray(np.stack(bytes_of_ids, axis=-1))


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encodes a mask (height, width) as pycocotools does: run lengths, column by column.

    Returns:
        ``size``, [height, width], and ``counts``, the run lengths as text, starting with zeros.
    """
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    lengths = np.diff(changes, prepend=0, append=pixels.size).tolist()
    if pixels[0]:
        lengths.insert(0, 0)
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
