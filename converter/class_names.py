"""The names of a model's classes, and which of them are stuff."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from converter.errors import UnreadableFileError
from converter.files import is_unicode, read_text


@dataclass(frozen=True)
class ClassNames:
    """The classes of a model, in the order of its class logits, without "no object".

    Attributes:
        names: one name per class id.
        stuff: ids of the classes that have no instances (sky, grass), ascending.
    """

    names: tuple[str, ...]
    stuff: tuple[int, ...] = ()


def unnamed(count: int, stuff: tuple[int, ...] = ()) -> ClassNames:
    """Transformers' placeholder names, LABEL_0 and so on, for classes without names."""
    return ClassNames(tuple(f"LABEL_{i}" for i in range(count)), stuff)


def of_dataset(name: str) -> ClassNames:
    """The class names of a dataset from the package's files, such as ``coco_panoptic``."""
    file = resources.files("converter") / "labels" / f"{name}.json"
    return _parse(file.read_text(encoding="utf-8"), f"{name}.json")


def of_config(config: Mapping[str, Any], count: int) -> ClassNames:
    """The class names in a model's config.json; placeholders if it has none.

    Raises:
        UnreadableFileError: its id2label or stuff_classes is not valid.
    """
    labels = config.get("id2label") or {str(i): name for i, name in enumerate(unnamed(count).names)}
    stuff = config.get("stuff_classes") or []
    try:
        names = tuple(labels[str(i)] for i in range(len(labels)))
    except (KeyError, TypeError) as error:
        raise UnreadableFileError(
            "id2label in config.json is not valid; expected a name for every class id from 0 on."
        ) from error
    if not isinstance(stuff, list) or not all(
        type(i) is int and 0 <= i < len(names) for i in stuff
    ):
        raise UnreadableFileError(
            f"stuff_classes in config.json is {shortened(stuff)}, not a list of class ids."
        )
    return _checked(names, tuple(stuff), "config.json")


def read(path: Path) -> ClassNames:
    """Reads a file of class names.

    Three forms are supported: one name per line; a JSON list of names; a JSON object with
    ``categories``, each with ``id``, ``name`` and, for panoptic data, ``isthing``.

    Raises:
        UnreadableFileError: the file cannot be read, or is in none of these forms.
    """
    try:
        text = read_text(path, encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror
        raise UnreadableFileError(
            f"The labels in {path} cannot be read: {reason}.",
            "Write the output of the command to a file first: COMMAND > labels.txt."
            if path.is_fifo()
            else "",
        ) from error
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"The labels in {path} cannot be read: {error}.") from error
    return _parse(text, path.name)


def _parse(text: str, file: str) -> ClassNames:
    if not text.lstrip().startswith(("[", "{")):
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        return _checked(names, (), file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"The labels in {file} are not valid JSON: {error}") from error
    if isinstance(content, list):
        return _checked(tuple(content), (), file)
    return _from_categories(content.get("categories"), file)


def _from_categories(categories: Any, file: str) -> ClassNames:
    form = "each category needs an id (0, 1, 2, ... without gaps) and a name"
    try:
        ordered = sorted(categories, key=lambda category: category["id"])
        ids = [category["id"] for category in ordered]
        names = tuple(category["name"] for category in ordered)
        stuff = tuple(c["id"] for c in ordered if not c.get("isthing", True))
    except (TypeError, KeyError, AttributeError) as error:
        raise UnreadableFileError(f"The categories in {file} are not valid: {form}.") from error
    if ids != list(range(len(ids))):
        raise UnreadableFileError(f"The category ids in {file} have gaps or repeats: {form}.")
    return _checked(names, stuff, file)


def _checked(names: tuple[Any, ...], stuff: tuple[int, ...], file: str) -> ClassNames:
    if not names:
        raise UnreadableFileError(f"There are no class names in {file}.")
    for name in names:
        if not isinstance(name, str):
            raise UnreadableFileError(f"A class name in {file} is not text: {shortened(name)}.")
        if not is_unicode(name):
            raise UnreadableFileError(
                f"A class name in {file} holds half of a character (a lone surrogate): {name!r}."
            )
    return ClassNames(names, stuff)
