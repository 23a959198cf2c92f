"""Draws scenes of shapes, annotated in COCO's panoptic format, to train on.

    python examples/scenes.py scenes --train 300 --val 48

They are like those of fixtures/shapes_panoptic_128, with stars added: circles, squares, triangles
and stars (things) in front of two of sky, grass and sand (stuff). Colours vary around one per
class; circles and stars share theirs, so that only their form tells them apart. The same seed draws
the same scenes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLOURS = {
    "circle": (225, 60, 40),
    "square": (40, 50, 190),
    "triangle": (240, 235, 225),
    "star": (225, 60, 40),
    "sky": (110, 160, 225),
    "grass": (65, 130, 55),
    "sand": (210, 185, 125),
}
CLASSES = list(COLOURS)
THINGS = 4


def outline(kind: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """Corners (corners, 2) of a shape whose size is 1, turned at random."""
    corners = {"circle": 64, "square": 4, "triangle": 3, "star": 10}[kind]
    angles = np.arange(corners) * 2 * np.pi / corners + rng.uniform(0, 2 * np.pi)
    radii = np.where(np.arange(corners) % 2, 0.45, 1.0) if kind == "star" else np.ones(corners)
    return np.stack((radii * np.cos(angles), radii * np.sin(angles)), axis=1)


def draw(rng: np.random.Generator) -> tuple[Image.Image, Image.Image, list[dict[str, Any]]]:
    """A scene, its id map (id = R + 256 G + 256² B) and its segments."""
    width, height = (int(side) for side in rng.integers(80, 181, 2))
    shapes = [CLASSES[i] for i in rng.integers(THINGS, size=rng.integers(1, 5))]
    names = [*rng.permutation(CLASSES[THINGS:])[:2].tolist(), *shapes]
    picture, id_map = Image.new("RGB", (width, height)), Image.new("RGB", (width, height))
    for index, name in enumerate(names):
        if index == 0:  # behind all others
            corners = [(0.0, 0.0), (width, 0), (width, height), (0, height)]
        elif index == 1:  # below a horizon, which may lean
            left, right = rng.uniform(0.35, 0.6) * height + rng.uniform(-8, 8, 2)
            corners = [(0, left), (width, right), (width, height), (0, height)]
        else:
            size = rng.uniform(0.08, 0.18) * (width + height) / 2
            centre = rng.uniform(size, np.array([width, height]) - size)
            corners = [(x, y) for x, y in centre + size * outline(name, rng)]
        colour = np.clip(rng.normal(COLOURS[name], 14), 0, 255).astype(int).tolist()
        ImageDraw.Draw(picture).polygon(corners, fill=tuple(colour))
        ImageDraw.Draw(id_map).polygon(corners, fill=(index + 1, 0, 0))
    noisy = np.asarray(picture) + rng.normal(0, 6, (height, width, 3))
    ids = np.asarray(id_map)[:, :, 0]
    segments = []
    for index, name in enumerate(names):
        rows, columns = np.nonzero(ids == index + 1)
        if len(rows):
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1]
            segment = {"id": index + 1, "category_id": CLASSES.index(name) + 1, "bbox": box}
            segments.append({**segment, "area": len(rows), "iscrowd": 0})
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), id_map, segments


def write(folder: Path, count: int, rng: np.random.Generator) -> None:
    """Writes panoptic.json, and the folders panoptic and images."""
    images, annotations = [], []
    for name in ("images", "panoptic"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture, id_map, segments = draw(rng)
        name = f"{number:06}.png"
        picture.save(folder / "images" / name)
        id_map.save(folder / "panoptic" / name)
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": number, "file_name": name, **size})
        annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
    categories = [
        {"id": index + 1, "name": name, "isthing": int(index < THINGS)}
        for index, name in enumerate(CLASSES)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws annotated scenes of shapes.")
    parser.add_argument("output", type=Path, help="gets the folders train and val")
    parser.add_argument("--train", type=int, default=300, help="number of scenes, default 300")
    parser.add_argument("--val", type=int, default=48, help="likewise, default 48")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for number, part in enumerate(("train", "val")):
        rng = np.random.default_rng((arguments.seed, number))
        write(arguments.output / part, getattr(arguments, part), rng)


if __name__ == "__main__":
    main()
