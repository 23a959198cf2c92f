"""Structure-aware fuzzing of the commands, run by hand: values and shapes that make no sense.

``python tests/fuzz_values.py --cases 20000 --seed 0``; ``--only N`` with the same seed runs one
case again, and shows what came of it.

In every case, one or more values of a valid file become others, and a command is run on it as on
the command line. It ends as it should, or with an error that a user can understand; anything else
is a finding: a fault, a warning of Python's, a character that acts on a terminal, JSON that is
none, a file where none belongs, more memory or more time than the limits.
"""

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from dataset_files import write_coco_instances, write_coco_panoptic, write_picture
from hub_client import choose_transfer, point_client_at
from hub_server import running_hub
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import save_ade20k_model

import converter
from converter.cli import main as command_line
from reference_model import (
    EomtImageProcessor,
)

FIXTURES = Path(__file__).parent.parent / "fixtures"
PANOPTIC, SEMANTIC = ("tiny_panoptic_48x80", "tiny_panoptic_64"), "tiny_semantic_48"
INSTANCE = "tiny_instance_64_gated"
MODELS = (*PANOPTIC, SEMANTIC, INSTANCE)

TOKEN = "hf_of_the_fuzzer"  # noqa: S105  # for the loopback Hub

# what a case may use, in addition to what it had at its start
SECONDS = 20
BYTES = 2**30

FAULT = "This is a bug in eomt-convert"

Document = dict[str, Any]
Rng = random.Random
Entry = TypeVar("Entry")


# values -----------------------------------------------------------------------------------------

TEXTS = (
    *("", " ", "a", "0", "-1", "nan", "None", "true", "\0", "a\0b", "\n", "a\nb", "\r", "\x1b[2J"),
    *("\u202e", "a\u200bb", "\ud800", "a\udfffb", "\ufeff", "\U000e0041", "é", "日本語", "x" * 300),
    *("../x", "/etc/passwd", "..", ".", "a/b", "a/b/c", "~", "C:\\x", "x" * 100_000, "-x", "*"),
    *("<script>", "`x`", "| a | b |", "<!-- x", "{{ x }}", "%s", "https://example.org", "#: a"),
    *("- a\n- b", "!!python/object:x", "a: b", "&a", "f" * 64, "0" * 40, "owner/name@main"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 5, 7, 16, 63, 64, 65, 255, 256, 1000, 2**14, 2**16, 2**24, 2**31, 2**32),
    *(2**40, 2**63, 2**64, -(2**31), -(2**63), 10**30, 10**330, -(10**330)),
    *(0.5, -0.5, 0.0, -0.0, 1e-45, 1e-320, 1e12, 1e38, 1e308, -1e308, 1.0, 64.0),
    *(math.nan, math.inf, -math.inf),
)

# JSON that no Python value gives, by the text that is replaced with it when it is written
RAW = {
    "\ue000deep list": "[" * 100_000 + "]" * 100_000,
    "\ue000deep object": '{"a":' * 50_000 + "0" + "}" * 50_000,
    "\ue000digits": "9" * 5_000,
    "\ue0001e999": "1e999",
    "\ue000twice": '{"a": 1, "a": 2}',
}


def nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def odd_value(rng: Rng) -> Any:
    """A value from the edge of what JSON can say."""
    match rng.randrange(8):
        case 0 | 1 | 2:
            return rng.choice(NUMBERS)
        case 3 | 4:
            return rng.choice(TEXTS)
        case 5:
            return rng.choice((None, True, False, [], {}))
        case 6:
            length = rng.choice((1, 2, 3, 4, 5, 100, 10_000))
            return [rng.choice((0, 1, 0.5, "a", None, [], rng.choice(NUMBERS)))] * length
    return rng.choice((nested(5), nested(300), {"": 0}, {"0": "a"}, [[]], [{}], *RAW))


def retyped(value: Any, rng: Rng) -> Any:
    """The same value as another type, if possible."""
    ways: list[Any] = [str(value)[:1000], [value], {"a": value}, bool(value), None]
    if isinstance(value, int | float) and not isinstance(value, bool):
        ways += [-value, value + 1, value - 1, value * 2, str(value)]
        ways += [float(value), value / 2] if abs(value) < 1e300 else []
    if isinstance(value, str):
        ways += [value + rng.choice(TEXTS), rng.choice(TEXTS) + value, value[1:], value.upper()]
        ways += [int(value)] if value.isdecimal() else [list(value)]
    if isinstance(value, list):
        ways += [value[1:], value[:-1], value * 2, value[::-1], dict(enumerate(map(str, value)))]
        ways += [[*value, odd_value(rng)], [value, value]]
    if isinstance(value, dict):
        ways += [list(value), list(value.values()), dict(list(value.items())[1:])]
    return rng.choice(ways)


def change(document: Any, rng: Rng) -> tuple[Any, str]:
    """Changes one value of a document, in place where it can; returns it, and says what was done.

    From its top on one goes down at random, so that an object of a thousand entries is found no
    more often than the number beside it.
    """
    parent: Any = None
    key: Any = None
    place, value = "", document
    while isinstance(value, dict | list) and value and rng.random() < (0.9 if place else 0.98):
        parent = value
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        place, value = f"{place}.{key}", value[key]
    way = rng.choice(("replace", "replace", "replace", "retype", "retype", "delete", "copy", "key"))
    if parent is None:
        return odd_value(rng), "replace all of it"
    if way == "delete":
        del parent[key]
    elif way == "copy":
        if isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(value))
        else:
            parent[rng.choice(list(parent))] = copy.deepcopy(value)
    elif way == "key" and isinstance(parent, dict):
        parent[rng.choice((*TEXTS, f"{key} ", "0", "name"))] = parent.pop(key)
    elif way == "retype":
        parent[key] = retyped(value, rng)
    else:
        way = "replace"
        parent[key] = odd_value(rng)
    return document, f"{way} {place[1:100]}"


def changed(document: Any, rng: Rng) -> tuple[Any, str]:
    """Changes one value of a document, or now and then a few."""
    document = copy.deepcopy(document)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document, way = change(document, rng)
        done.append(way)
    return document, ", ".join(done)


def written(document: Any, rng: Rng) -> bytes:
    """A document as JSON; sometimes as bytes that are not quite JSON."""
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    content = text.encode()
    match rng.randrange(100):
        case 0:
            return content[: rng.randrange(len(content) + 1)]
        case 1:
            return b"\xef\xbb\xbf" + content
        case 2:
            return text.encode("utf-16")
        case 3:
            return content + content
        case 4:
            return b""
        case 5:
            return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return content


# tensors and pictures ---------------------------------------------------------------------------

DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint8, torch.bool, torch.float32),
)


def odd_tensor(tensor: torch.Tensor, rng: Rng) -> torch.Tensor:
    """A tensor of another type, rank, size or of other values."""
    axis = rng.randrange(tensor.ndim) if tensor.ndim else 0
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.to(rng.choice(DTYPES)),
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: tensor.flatten()[:0],
        lambda: torch.tensor(1.0),
        lambda: torch.zeros_like(tensor),
        lambda: tensor.transpose(0, -1) if tensor.ndim else tensor,
        lambda: tensor.movedim(0, -1) if tensor.ndim else tensor,
        lambda: tensor.narrow(axis, 0, 1) if tensor.numel() else tensor,
        lambda: tensor.narrow(axis, 0, 0) if tensor.ndim else tensor,
        lambda: torch.cat([tensor, tensor], axis) if tensor.ndim else tensor,
        lambda: tensor.narrow(axis, 0, tensor.shape[axis] - 1) if tensor.numel() > 1 else tensor,
        lambda: -tensor if tensor.dtype not in (torch.bool, torch.uint8) else tensor,
        lambda: torch.full_like(tensor, rng.choice((1, 100, 127))),
        lambda: (
            torch.full_like(tensor, rng.choice((math.nan, math.inf, 1e38, -1e38, 1e-45)))
            if tensor.is_floating_point()
            else torch.full_like(tensor, torch.iinfo(tensor.dtype).max)
        ),
        lambda: (
            tensor.clone().fill_(torch.iinfo(tensor.dtype).min)
            if not tensor.is_floating_point()
            else tensor * 1e30
        ),
    ]
    if tensor.dtype == torch.bool:
        ways = ways[:4]
    return rng.choice(ways)().contiguous()


def odd_tensors(
    tensors: Mapping[str, torch.Tensor], rng: Rng
) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors with one of them (sometimes a few) missing, renamed or changed."""
    found, done = dict(tensors), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not found:
            break
        # chosen by the first part of the name, because some first parts have dozens of names
        parts = sorted({name.partition(".")[0] for name in found})
        part = rng.choice(parts)
        name = rng.choice([name for name in found if name.partition(".")[0] == part])
        way = rng.choice(("change", "change", "change", "change", "delete", "rename", "copy"))
        if way == "change":
            found[name] = odd_tensor(found[name], rng)
        elif way == "delete":
            del found[name]
        else:
            other = rng.choice((*found, re.sub(r"\d+", "99", name), f"{name}.0", "pipeline.x", "é"))
            found[other] = found[name].clone()
            if way == "rename" and other != name:
                del found[name]
        done.append(f"{way} {name}")
    return found, ", ".join(done)


def odd_picture(pixels: NDArray[np.uint8], path: Path, rng: Rng) -> str:
    """Writes a picture in another mode, size or format, or of other values; says what was done."""
    image = Image.fromarray(pixels)
    way = rng.choice(("mode", "size", "noise", "format", "bytes", "plain", "frames"))
    if way == "mode":
        mode = rng.choice(("1", "L", "P", "LA", "RGBA", "CMYK", "I", "I;16", "F"))
        grey = image.convert("L") if mode == "I;16" else image
        grey.convert(mode).save(path, "TIFF" if mode in ("CMYK", "I", "F") else "PNG")
    elif way == "size":
        sides = (1, 2, 3, image.width, image.height, 400)
        image.resize((rng.choice(sides), rng.choice(sides))).save(path, "PNG")
    elif way == "noise":
        noise = rng.randbytes(pixels.size)
        Image.fromarray(np.frombuffer(noise, np.uint8).reshape(pixels.shape)).save(path, "PNG")
    elif way == "format":
        image.save(path, rng.choice(("JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")))
    elif way == "plain":
        Image.fromarray(np.full_like(pixels, rng.choice((0, 1, 255)))).save(path, "PNG")
    elif way == "frames":
        image.save(path, "PNG", save_all=True, append_images=[image.rotate(90), image])
    else:
        image.save(path, "PNG")
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 5))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
    return f"picture: {way}"


# what is valid ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Valid:
    """A folder of valid models, recordings and datasets, made once and never written to again."""

    folder: Path

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def data(self, name: str) -> Path:
        return self.folder / "data" / name


def make_valid(folder: Path) -> Valid:
    """Converts the offline checkpoints, and makes three small datasets for them."""
    valid = Valid(folder)
    for name in MODELS:
        converter.convert(name, valid.model(name))
        recorded = json.loads((FIXTURES / name / "recorded.json").read_text())
        if name == PANOPTIC[0]:
            stuff, classes = recorded["stuff_classes"], recorded["num_classes"]
    windows = EomtImageProcessor(size={"shortest_edge": 32}, do_split_image=True)
    save_ade20k_model(valid.model("ade20k"), windows)
    generator = np.random.default_rng(0)
    pictures = [generator.integers(256, size=(40, 56, 3), dtype=np.uint8) for _ in range(2)]
    ids = np.repeat(np.arange(1, 5), 10)[:, None] * np.ones((1, 56), np.int64)
    segments = [{"id": i, "category_id": i % classes, "iscrowd": i // 4} for i in range(1, 5)]
    categories = [{"id": i, "name": f"c{i}", "isthing": i not in stuff} for i in range(classes)]
    data = valid.data("coco-panoptic")
    write_coco_panoptic(data, pictures, [ids, ids], [segments] * 2, categories)
    box = {"segmentation": [[1, 1, 20, 1, 20, 20, 1, 20]], "category_id": 1, "iscrowd": 0}
    runs = {"segmentation": {"size": [40, 56], "counts": [100, 500, 1640]}, "iscrowd": 1}
    objects = [[box, {**runs, "category_id": 2}]] * 2
    five = [{"id": i, "name": f"c{i}"} for i in range(5)]
    write_coco_instances(valid.data("coco-instance"), pictures, objects, five)
    root = valid.data("ade20k-semantic") / "ADEChallengeData2016"
    for number, pixels in enumerate(pictures):
        write_picture(root / "images/validation" / f"{number}.jpg", pixels)
        labels = generator.integers(151, size=(40, 56), dtype=np.uint8)
        write_picture(root / "annotations/validation" / f"{number}.png", labels)
    return valid


@cache
def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


@cache
def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


@cache
def pixels_of(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


# cases ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A command, and the file that it is given in a form that it did not expect.

    Attributes:
        file, command: as the table at the end has them.
        arguments: of the command line.
        change: what was done to the file.
    """

    file: str
    command: str
    arguments: tuple[str, ...]
    change: str


# makes a case in a folder; the command runs with that folder as the working directory
Maker = Callable[[Valid, Path, Rng], Case]

CONFIG, PREPROCESSOR, HISTORY = "config.json", "preprocessor_config.json", "conversion.json"


def link_tree(source: Path, place: Path) -> None:
    """Makes a folder like another one, of links to its files."""
    place.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_dir():
            link_tree(path, place / path.name)
        else:
            (place / path.name).symlink_to(path)


def replace_file(path: Path, content: bytes) -> None:
    """Puts a file in the place of a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def change_json(path: Path, rng: Rng, content: Any = None) -> str:
    """Changes a JSON file that may be a link, or writes other content changed; says how."""
    document, done = changed(content or json_of(path.resolve()), rng)
    replace_file(path, written(document, rng))
    return done


def change_model(model: Path, file: str, rng: Rng) -> str:
    """Changes a file of a model; says how.

    Half of the time conversion.json tells the digests of what the files are now, so that more than
    the check of digests is reached.
    """
    done = change_json(model / file, rng)
    if rng.random() < 0.1 and file != HISTORY:
        other = rng.choice([name for name in (CONFIG, PREPROCESSOR) if name != file])
        done += f"; {other}: {change_json(model / other, rng)}"
    history = model / HISTORY
    if file != HISTORY and history.exists() and rng.random() < 0.5:
        content = json.loads(history.read_text())
        for name in (CONFIG, PREPROCESSOR):
            digest = hashlib.sha256((model / name).read_bytes()).hexdigest()
            content["files"][name]["sha256"] = digest
        replace_file(history, json.dumps(content).encode())
    return done


def any_options(rng: Rng, *extra: str) -> tuple[str, ...]:
    """Options that a command may also have."""
    options = [*rng.choice(((), ("--json",))), *rng.choice(((), (), (), ("--debug",)))]
    return (*options, *(extra if rng.random() < 0.2 else ()))


def any_model(valid: Valid, place: Path, rng: Rng) -> str:
    """Copies one of the models into a case's folder; returns its name."""
    name = rng.choice(MODELS)
    link_tree(valid.model(name), place / "model")
    return name


def verify_model(file: str) -> Maker:
    def make(valid: Valid, place: Path, rng: Rng) -> Case:
        name = any_model(valid, place, rng)
        done = change_model(place / "model", file, rng)
        level = rng.choices((1, 2, 3, 5), (50, 45, 3, 2))[0]
        sources: tuple[str, ...] = ()
        if rng.random() < 0.1:
            root = FIXTURES / name
            sources = ("--delta", str(root / "delta"), "--backbone", str(root / "backbone"))
        options = any_options(rng, "--report", "report.html", "--require-verified")
        arguments = ("verify", "model", "--level", str(level), *sources, *options)
        return Case(file, "verify", arguments, done)

    return make


def verify_recording(file: str) -> Maker:
    def make(valid: Valid, place: Path, rng: Rng) -> Case:
        name = any_model(valid, place, rng)
        source = FIXTURES / name
        recorded = place / "recorded"
        link_tree(source / "images", recorded / "images")
        if file == "recorded.json":
            (recorded / "recorded.safetensors").symlink_to(source / "recorded.safetensors")
            (recorded / "recorded.json").symlink_to(source / "recorded.json")
            if rng.random() < 0.7:  # else it is known by its digest, and recorded.json is not read
                hide(recorded)
            path = recorded / "recorded.json"
            done = change_json(path, rng, json.loads(path.read_text()))
        else:
            tensors, done = odd_tensors(tensors_of(source / "recorded.safetensors"), rng)
            save_file(tensors, recorded / "recorded.safetensors")
            (recorded / "recorded.json").symlink_to(source / "recorded.json")
            tell_digest(recorded)
        level = rng.choices((3, 4, 5), (50, 40, 10))[0]
        options = any_options(rng, "--report", "report.html")
        arguments = ("verify", "model", "--recorded", "recorded", "--level", str(level), *options)
        return Case(file, "verify", arguments, done)

    return make


def hide(recorded: Path) -> None:
    """Changes a recording so that it is not a known one, and makes it as small as possible."""
    file = recorded / "recorded.safetensors"
    kept = ("pixels", "mask_logits", "class_logits", "pipeline")
    tensors = {
        name: tensor
        for name, tensor in tensors_of(file.resolve()).items()
        if name.partition(".")[0] in kept
    }
    file.unlink()
    save_file(tensors, file)
    tell_digest(recorded)


def tell_digest(recorded: Path) -> None:
    """Writes the digest of the recording into the recorded.json beside it."""
    content = copy.deepcopy(json_of((recorded / "recorded.json").resolve()))
    digest = hashlib.sha256((recorded / "recorded.safetensors").read_bytes()).hexdigest()
    content["sha256"]["recorded.safetensors"] = digest
    content["model"] = {
        "basis": "original",
        "tensors": {"a": digest},
        "files": [{"name": name, "sha256": digest} for name in (CONFIG, PREPROCESSOR)],
        "dtypes": ["F32"],
    }
    replace_file(recorded / "recorded.json", json.dumps(content).encode())


def record_model(file: str) -> Maker:
    def make(valid: Valid, place: Path, rng: Rng) -> Case:
        name = any_model(valid, place, rng)
        if file != HISTORY and rng.random() < 0.9:  # else the recording that it names is looked at
            (place / "model" / HISTORY).unlink()
        options = any_options(rng, "--layers")
        if file == "picture":
            source = FIXTURES / name / "images" / "0.png"
            done = odd_picture(pixels_of(source), place / "picture.png", rng)
        elif file == "recorded.json":  # of the recording that is to be replaced
            link_tree(FIXTURES / name / "images", place / "out" / "images")
            (place / "out" / file).symlink_to(FIXTURES / name / file)
            (place / "out" / "recorded.safetensors").symlink_to(
                FIXTURES / name / "recorded.safetensors"
            )
            content = copy.deepcopy(json_of(FIXTURES / name / file))
            content["provenance"]["implementation"] = "eomt-convert 1, reference model"
            done = change_json(place / "out" / file, rng, content)
            options = (*options, "--force")
        else:
            done = change_model(place / "model", file, rng)
        inputs = ("--random", "1")
        if file == "picture":
            inputs = ("--image", "picture.png")
        elif rng.random() < 0.6:
            inputs = ("--image", str(FIXTURES / name / "images" / "0.png"))
        return Case(file, "record", ("record", "model", "--output", "out", *inputs, *options), done)

    return make


def push_model(file: str) -> Maker:
    def make(valid: Valid, place: Path, rng: Rng) -> Case:
        any_model(valid, place, rng)
        done = change_model(place / "model", file, rng)
        arguments = ("push", "model", "me/model", "--dry-run", *any_options(rng, "--tag", "v1"))
        if rng.random() < 0.5:
            (place / "LICENSE.md").write_text("DINOv3 License\n")
            arguments += ("--license-file", "LICENSE.md")
        arguments += rng.choice(((), ("--allow-unverified",)))
        return Case(file, "push --dry-run", arguments, done)

    return make


def segment_pictures(file: str) -> Maker:
    def make(valid: Valid, place: Path, rng: Rng) -> Case:
        name = any_model(valid, place, rng)
        picture = str(FIXTURES / name / "images" / "0.png")
        if file == "picture":
            done = odd_picture(pixels_of(Path(picture)), place / "picture.png", rng)
            picture = "picture.png"
        else:
            done = change_model(place / "model", file, rng)
        tasks = ("panoptic", "instance", "semantic")
        options = any_options(rng, "--task", rng.choice(tasks))
        arguments = ("segment", "model", picture, "--output", "out", *options)
        return Case(file, "segment", arguments, done)

    return make


DATASETS = {"coco-panoptic": PANOPTIC[0], "coco-instance": INSTANCE, "ade20k-semantic": "ade20k"}
ANNOTATIONS = {
    "coco-panoptic": "annotations/panoptic_val2017.json",
    "coco-instance": "annotations/instances_val2017.json",
}


def evaluate_model(file: str) -> Maker:
    def make(valid: Valid, place: Path, rng: Rng) -> Case:
        names = list(ANNOTATIONS if file == "dataset JSON" else DATASETS)
        dataset = rng.choice(names)
        if file == HISTORY and dataset == "ade20k-semantic":  # which was not converted
            dataset = "coco-panoptic"
        model, data = valid.model(DATASETS[dataset]), valid.data(dataset)
        link_tree(model, place / "model")
        link_tree(data, place / "data")
        if file == "dataset JSON":
            done = change_json(place / "data" / ANNOTATIONS[dataset], rng)
        elif file == "dataset pictures":
            path = rng.choice(sorted([*data.rglob("*.png"), *data.rglob("*.jpg")]))
            link = place / "data" / path.relative_to(data)
            link.unlink()
            done = odd_picture(pixels_of(path), link, rng)
        else:
            done = change_model(place / "model", file, rng)
        arguments = ("evaluate", "model", "--dataset", dataset, "--data", "data")
        return Case(file, "evaluate", (*arguments, *any_options(rng)), done)

    return make


def convert_with_labels(valid: Valid, place: Path, rng: Rng) -> Case:
    """Class names as text, as a list and as categories."""
    names = [f"class {i}" for i in range(7)]
    form = rng.choice(("text", "list", "categories"))
    if form == "text":
        lines: list[str] = list(names)
        for _ in range(rng.choice((1, 1, 2, 3))):
            lines[rng.randrange(len(lines))] = str(rng.choice((*TEXTS, *NUMBERS)))
        lines = lines[: rng.choice((0, 1, 6, 7, 7, 7))] + ["x"] * rng.choice((0, 0, 0, 1, 70_000))
        content = rng.choice(("\n", "\r\n", "\r", "\u2028", "\0")).join(lines)
        encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
        errors = "surrogatepass" if encoding.startswith("utf") else "replace"
        (place / "labels").write_bytes(content.encode(encoding, errors))
        done = "lines"
    else:
        categories = [{"id": i, "name": name, "isthing": i % 2} for i, name in enumerate(names)]
        document: Any = names if form == "list" else {"categories": categories}
        done = change_json(place / "labels", rng, document)
    source = FIXTURES / PANOPTIC[1]
    arguments: tuple[str, ...] = ("--task", "panoptic", "--image-size", "64", "--labels", "labels")
    arguments += ("--delta", str(source / "delta"), "--backbone", str(source / "backbone"))
    arguments += ("--output", "out", rng.choices(("--dry-run", "--no-verify"), (3, 1))[0])
    return Case("labels", "convert", (*arguments, *any_options(rng)), f"{form}: {done}")


# every kind of case and its frequency: quick ones are more frequent
MAKERS: Mapping[Maker, int] = {
    verify_model(CONFIG): 18,
    verify_model(PREPROCESSOR): 14,
    verify_model(HISTORY): 18,
    verify_recording("recorded.json"): 7,
    verify_recording("recorded.safetensors"): 8,
    record_model(CONFIG): 5,
    record_model(PREPROCESSOR): 4,
    record_model(HISTORY): 3,
    record_model("recorded.json"): 3,
    record_model("picture"): 1,
    push_model(CONFIG): 7,
    push_model(PREPROCESSOR): 3,
    push_model(HISTORY): 12,
    segment_pictures(CONFIG): 7,
    segment_pictures(PREPROCESSOR): 8,
    segment_pictures(HISTORY): 4,
    segment_pictures("picture"): 2,
    evaluate_model(CONFIG): 4,
    evaluate_model(PREPROCESSOR): 4,
    evaluate_model(HISTORY): 3,
    evaluate_model("dataset JSON"): 12,
    evaluate_model("dataset pictures"): 4,
    convert_with_labels: 7,
}


# running them -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        number: of the case.
        refused: whether the command ended with an error that a user can understand; a verdict,
            whichever, is none.
        finding: what it did that no command may do; empty where there is nothing.
        output: what it printed.
        seconds: that it took.
    """

    number: int
    case: Case
    refused: bool
    finding: str
    output: str
    seconds: float


class OverTimeError(BaseException):
    """A case took longer than its limit; a BaseException, as Ctrl+C, so that nothing handles it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OverTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def memory(key: str) -> int:
    """Memory of this process in bytes: VmRSS is the current value, VmHWM the peak."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s*(\d+) kB", status)
    return int(found[1]) << 10 if found else 0


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes VmRSS


@contextmanager
def fuzzing() -> Iterator[tuple[Valid, Path]]:
    """Valid files, an empty folder for cases, and a loopback Hub as the only one."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        hub = stack.enter_context(running_hub())
        choose_transfer(hub, "lfs")
        point_client_at(patch, hub, folder / "home")
        hub.add_user("me", TOKEN)
        patch.setenv("HF_TOKEN", TOKEN)
        valid = make_valid(folder / "valid")
        before = tree_digest(valid.folder)
        (folder / "cases").mkdir()
        patch.chdir(folder)
        yield valid, folder / "cases"
        patch.chdir(folder)
        if tree_digest(valid.folder) != before:
            raise AssertionError("a command has changed a file that it was to read")


def tree_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def run_case(number: int, seed: int, valid: Valid, cases: Path) -> Outcome:
    """Makes a case, runs its command and looks at what it did; the same for the same numbers."""
    rng = random.Random(f"{seed} {number}")  # noqa: S311
    place = cases / str(number)
    place.mkdir()
    try:
        maker = rng.choices(list(MAKERS), list(MAKERS.values()))[0]
        case = maker(valid, place, rng)
        os.chdir(place)
        return _run(number, case, place)
    finally:
        os.chdir(cases)
        shutil.rmtree(place)


def _run(number: int, case: Case, place: Path) -> Outcome:
    there = {path.name for path in (*place.iterdir(), *place.parent.iterdir())}
    forget_peak()
    had, start = memory("VmRSS"), time.monotonic()
    findings = []
    stdout = stderr = ""
    code: int | None = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with time_limit(SECONDS):
                # with color, click takes no control sequences out
                result = CliRunner().invoke(command_line, list(case.arguments), color=True)
        except OverTimeError:
            findings.append(f"it takes longer than {SECONDS} seconds")
        else:
            stdout, stderr, code = result.stdout, result.stderr, result.exit_code
            if result.exception and not isinstance(result.exception, SystemExit):
                findings.append(f"{type(result.exception).__name__}: {result.exception}")
    seconds = time.monotonic() - start
    if FAULT in stderr:
        findings.append("a fault: " + stderr[: stderr.index(FAULT)].strip().split("\n")[-1])
    elif code not in (0, 1, 2, 3, 4, None):
        findings.append(f"it ends with {code}")
    if code not in (0, None) and not (stdout + stderr).strip():
        findings.append("it fails without a word")
    findings += [f"{w.category.__name__}: {w.message}" for w in warned]
    findings += _wrong_output(case, stdout, stderr, place)
    taken = memory("VmHWM") - had
    if taken > BYTES:
        findings.append(f"it takes {taken >> 20} MiB")
    new = {path.name for path in (*place.iterdir(), *place.parent.iterdir())} - there
    if new - {"out", "report.html"}:
        findings.append(f"it leaves {sorted(new)} behind")
    finding = "; ".join(dict.fromkeys(findings))
    refused = re.search("^Error: ", stderr, re.MULTILINE) is not None
    return Outcome(number, case, refused, finding, stdout + stderr, seconds)


def _wrong_output(case: Case, stdout: str, stderr: str, place: Path) -> Iterator[str]:
    """What is wrong with what a command printed."""
    texts = {"stdout": stdout, "stderr": stderr}
    if (place / "report.html").exists():
        texts["report.html"] = (place / "report.html").read_text()
    for name, text in texts.items():
        acting = {c for c in text if not c.isprintable() and c != "\n"}
        if acting:
            yield f"{name} has {' '.join(sorted(map(ascii, acting)))}"
    if "--json" in case.arguments and stdout:
        try:
            json.loads(stdout, parse_constant=_no_json)
        except (ValueError, RecursionError) as error:
            yield f"--json is not JSON: {error}"


def _no_json(constant: str) -> None:
    raise ValueError(f"it has {constant}")


def run_range(first: int, end: int, step: int, seed: int, limit: int) -> list[Outcome]:
    """Runs every step-th case in a separate process with limited memory."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    torch.set_num_threads(1)
    outcomes = []
    with fuzzing() as (valid, cases):
        for number in range(first, end, step):
            outcome = run_case(number, seed, valid, cases)
            if outcome.finding:
                describe(outcome)
            outcomes.append(outcome)
            if len(outcomes) % 1000 == 0:
                print(f"... {number}", file=sys.stderr, flush=True)
    return outcomes


def describe(outcome: Outcome) -> None:
    case = outcome.case
    command = " ".join(case.arguments)
    text = f"case {outcome.number}: {case.file}: {case.change}\n  {command}\n  {outcome.finding}"
    print(ascii(text)[1:-1].replace("\\n", "\n")[:2000], flush=True)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """For every file and command: number of cases, refused, completed, findings."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        kind = "finding" if outcome.finding else ("refused" if outcome.refused else "done")
        count = counts.setdefault((outcome.case.file, outcome.case.command), Counter())
        count.update((kind, "cases"))
    total: Counter[str] = sum(counts.values(), Counter())
    rows = [(*key, counts[key]) for key in sorted(counts)] + [("all", "", total)]
    lines = ["| file | command | cases | refused | done | findings |", "|---|---|---|---|---|---|"]
    for file, command, count in rows:
        numbers = (f"{count[kind]:,}" for kind in ("cases", "refused", "done", "finding"))
        lines.append(f"| {' | '.join((file, command, *numbers))} |")
    return lines


def main() -> int:
    """Runs cases, and prints the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", type=int, help="one case, and all that it prints")
    parser.add_argument("--memory", type=int, default=6, help="GiB that a process may take")
    options = parser.parse_args()
    if options.only is not None:
        (outcome,) = run_range(
            options.only, options.only + 1, 1, options.seed, options.memory << 30
        )
        describe(outcome)
        print(outcome.output)
        return int(bool(outcome.finding))
    start, end = time.monotonic(), options.first + options.cases
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        parts = [
            pool.submit(
                run_range,
                options.first + job,
                end,
                options.jobs,
                options.seed,
                options.memory << 30,
            )
            for job in range(options.jobs)
        ]
        outcomes = [outcome for part in parts for outcome in part.result()]
    print("\n".join(table(outcomes)))
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(
        f"seed {options.seed}, {options.jobs} processes, {time.monotonic() - start:.0f} seconds; "
        f"the slowest case, {slowest.number}, took {slowest.seconds:.1f}"
    )
    return int(any(outcome.finding for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
