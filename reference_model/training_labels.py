"""Segmentation maps as what training needs: the mask and the class of every segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from reference_model.pictures import Picture, flatten, read_map

Classes: TypeAlias = Mapping[int, int]  # by id of a segmentation map


def maps_and_classes(
    segmentation_maps: Picture | Sequence[Any],
    classes: Classes | Sequence[Classes] | None,
    sizes: Sequence[tuple[int, int]],
) -> list[tuple[Image.Image, Classes | None]]:
    """Every picture's segmentation map, of 32-bit integers, and the classes of its ids.

    Args:
        segmentation_maps: as EomtImageProcessor takes them.
        classes: one mapping, or one for each picture; None if the ids are classes.
        sizes: (width, height) of every picture, in pixels.

    Raises:
        ValueError: maps, mappings and pictures do not fit each other.
    """
    maps = [read_map(entry) for entry in flatten(segmentation_maps, 2)]
    if [entry.size for entry in maps] != list(sizes):
        raise ValueError("segmentation maps must be as many as the pictures, and of their size")
    if classes is None or isinstance(classes, Mapping):
        return [(entry, classes) for entry in maps]
    return list(zip(maps, classes, strict=True))


def masks_and_classes(
    ids: NDArray[Any], classes: Classes | None, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Every id's mask, (segments, height, width) float32, and class, (segments,) int64.

    Args:
        ids: (height, width) integers.
        classes: by id; None if the ids are classes.
        ignore_index: if given, id 0 is ignored, as is the class of this number, and the other ids
            are counted from 1.

    Raises:
        ValueError: an id has no class.
    """
    first = 0 if ignore_index is None else 1
    present = [
        number
        for number in np.unique(ids).tolist()
        if ignore_index is None or (number != 0 and number - first != ignore_index)
    ]
    try:
        found = [(number if classes is None else classes[number]) - first for number in present]
    except KeyError as error:
        raise ValueError(f"instance_id_to_semantic_id has no class for id {error}") from error
    masks = ids == np.array(present, dtype=ids.dtype)[:, None, None]
    return torch.from_numpy(masks).float(), torch.tensor(found, dtype=torch.long)
