"""The names of a model's classes, and which of them are stuff."""

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from converter.errors import UnreadableFileError, UsageError
from converter.files import is_unicode, read_text

_FORM = "each category needs an id of its own, a whole number, and a name"


@dataclass(frozen=True)
class ClassNames:
    """The classes of a model, in the order of its class logits, without "no object".

    Attributes:
        names: one name per class id.
        stuff: ids of the classes that have no instances (sky, grass), ascending; None if nothing
            says which they are.
        category_ids: the classes' ids in the dataset, if they are not 0, 1, 2 and so on.
    """

    names: tuple[str, ...]
    stuff: tuple[int, ...] | None = None
    category_ids: tuple[int, ...] | None = None

    def with_stuff(self, stuff: Sequence[str]) -> "ClassNames":
        """The same classes, of which those with these names are stuff.

        Raises:
            UsageError: no class has one of the names; the message suggests similar names.
        """
        for name in stuff:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.5)
                raise UsageError(
                    f"--stuff names {name!r}, but no class has this name.",
                    f"Did you mean {' or '.join(near)}?"
                    if near
                    else f"The classes are {', '.join(self.names[:10])}"
                    f"{' and so on' if len(self.names) > 10 else ''}.",
                )
        ids = tuple(i for i, name in enumerate(self.names) if name in stuff)
        return replace(self, stuff=ids)


def split_names(text: str) -> list[str]:
    """The class names in a text such as ``sky,grass``; a name with a comma is in double quotes."""
    rows = csv.reader([text], skipinitialspace=True)
    return [name.strip() for row in rows for name in row if name.strip()]


def join_names(names: Sequence[str]) -> str:
    """The text from which `split_names` makes these names."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(names)
    return text.getvalue()


def unnamed(count: int, stuff: tuple[int, ...] | None = None) -> ClassNames:
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
    stuff = config.get("stuff_classes")
    try:
        names = tuple(labels[str(i)] for i in range(len(labels)))
    except (KeyError, TypeError) as error:
        raise UnreadableFileError(
            "id2label in config.json is not valid; expected a name for every class id from 0 on."
        ) from error
    if stuff is None:
        return _checked(names, None, "config.json")
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
    ``categories``, each with ``id``, ``name`` and, for panoptic data, ``isthing``. The order of
    the ids is the order of the classes; they may have gaps, as COCO's have.

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
        return _checked(names, None, file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"The labels in {file} are not valid JSON: {error}") from error
    if isinstance(content, list):
        return _checked(tuple(content), None, file)
    categories = content.get("categories")
    try:
        ordered = sorted(categories, key=lambda category: category["id"])
    except (TypeError, KeyError) as error:
        raise UnreadableFileError(f"The categories in {file} are not valid: {_FORM}.") from error
    return of_categories(ordered, file)


def of_categories(ordered: Sequence[Any], file: str) -> ClassNames:
    """The classes that categories describe, in their order.

    Args:
        ordered: dicts with ``id``, ``name`` and, for panoptic data, ``isthing``.
        file: where they come from.

    Raises:
        UnreadableFileError: they are not valid.
    """
    try:
        ids = tuple(category["id"] for category in ordered)
        names = tuple(category["name"] for category in ordered)
        things = [category.get("isthing") for category in ordered]
    except (TypeError, KeyError, AttributeError) as error:
        raise UnreadableFileError(f"The categories in {file} are not valid: {_FORM}.") from error
    if len(set(ids)) < len(ids) or not all(type(number) is int and number >= 0 for number in ids):
        raise UnreadableFileError(f"The category ids in {file} are not valid: {_FORM}.")
    if things.count(None) not in (0, len(things)):
        missing = names[things.index(None)]
        raise UnreadableFileError(
            f"Some categories in {file} have isthing, but {shortened(missing)} has not.",
            "Give every category isthing, or none, and name the stuff with --stuff.",
        )
    stuff = None if None in things else tuple(i for i, thing in enumerate(things) if not thing)
    classes = _checked(names, stuff, file)
    return classes if ids == tuple(range(len(ids))) else replace(classes, category_ids=ids)


def _checked(names: tuple[Any, ...], stuff: tuple[int, ...] | None, file: str) -> ClassNames:
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
