"""Parts of pictures to train on, as in github.com/tue-mps/eomt datasets/transforms.py."""

import argparse
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from converter.pictures.datasets import Dataset, Segments
from reference_model import EomtImageProcessor


@lru_cache(maxsize=2)
def order_of(pictures: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(pictures).tolist()
    return order


class Crops(torch.utils.data.Dataset[dict[str, Any]]):
    """All crops of a training in their order, which the seed decides."""

    def __init__(
        self, pictures: Dataset, processor: EomtImageProcessor, args: argparse.Namespace, count: int
    ) -> None:
        self.pictures, self.processor, self.args, self.count = pictures, processor, args, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, len(self.pictures))
        order = order_of(len(self.pictures), self.args.seed, epoch)
        rng = np.random.default_rng((self.args.seed, epoch, place))
        for offset in range(len(order)):  # the next one in place of one without segments
            example: Any = self.pictures.read(order[(place + offset) % len(order)])
            for _ in range(0 if all(example.target.crowd) else 100):
                if item := self.crop(example.image, example.target, rng):
                    return item
        raise ValueError(
            "no picture has a segment that is not a crowd and not too small to train on"
        )

    def crop(
        self, image: Image.Image, target: Segments, rng: np.random.Generator
    ) -> dict[str, Any] | None:
        """Flips, scales and crops a picture at random; None if no segment is in the crop."""
        ids = Image.fromarray((target.ids + 1).astype(np.int32))  # 0 for no segment
        if rng.random() < 0.5:
            image, ids = ImageOps.mirror(image), ImageOps.mirror(ids)
        height, width = self.processor.image_size
        scale = min(height / image.height, width / image.width) * rng.uniform(*self.args.scale)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        left = int(rng.integers(max(0, size[0] - width) + 1))
        top = int(rng.integers(max(0, size[1] - height) + 1))
        box = (left, top, left + width, top + height)  # beyond the picture it is 0
        crop = image.resize(size, Image.Resampling.BILINEAR).crop(box)
        labels = np.asarray(ids.resize(size, Image.Resampling.NEAREST).crop(box))
        found = [i for i in np.unique(labels).tolist() if i > 0 and not target.crowd[i - 1]]
        if not found:
            return None
        return {
            "pixel_values": self.processor(crop)["pixel_values"][0],
            "mask_labels": torch.from_numpy(labels == np.array(found)[:, None, None]),
            "class_labels": torch.tensor([target.classes[i - 1] for i in found]),
        }


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
    return batch | {"pixel_values": torch.stack(batch["pixel_values"])}
