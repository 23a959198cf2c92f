"""What a checkpoint of LightlyTrain says beside its weights: task, classes, sizes, normalisation.

Such a file is a dict with ``model_class_path``, ``model_init_args`` and the weights under
``train_model`` (github.com/lightly-ai/lightly-train, _commands/train_task.py; the arguments are
those of the classes in _task_models/dinov3_eomt_*/task_model.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from converter.catalog import Task
from converter.class_names import ClassNames, of_categories
from converter.errors import UnreadableFileError
from converter.weights.layouts import EOMT_LIGHTLY, Layout
from converter.weights.tensorfiles import ShardedTensorFile, TensorFile

_TASKS: Mapping[str, Task] = {
    "DINOv3EoMTPanopticSegmentation": "panoptic",
    "DINOv3EoMTInstanceSegmentation": "instance",
    "DINOv3EoMTSemanticSegmentation": "semantic",
}

# arguments of the backbone that change nothing but training, or that shapes show
_HARMLESS = {"patch_size", "drop_path_rate"}


@dataclass(frozen=True)
class LightlySettings:
    """What a checkpoint says.

    Attributes:
        task: what the model segments.
        image_size: (height, width) in pixels.
        mean, std: the pixels' statistics, one value per channel.
        classes: their names, and which of them are stuff.
        num_blocks: how many layers process queries.
    """

    task: Task
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: ClassNames
    num_blocks: int


def read_settings(
    file: TensorFile | ShardedTensorFile, layout: Layout | None
) -> LightlySettings | None:
    """Reads what a file says beside its weights; None if it is not one of LightlyTrain's.

    Raises:
        UnreadableFileError: it does not say all of it in the form that LightlyTrain writes, or
            has a backbone that is not DINOv3's own.
    """
    if layout is not EOMT_LIGHTLY:
        return None
    arguments = _Arguments(file.path, file.settings.get("model_init_args"))
    name = str(file.settings.get("model_class_path")).rpartition(".")[2]
    if name not in _TASKS:
        raise arguments.wrong(f"its model_class_path is {shortened(name)}", ", ".join(_TASKS))
    if changed := sorted(map(str, arguments.optional_dict("backbone_args").keys() - _HARMLESS)):
        raise arguments.wrong(f"its backbone_args have {', '.join(changed)}", "DINOv3's own")
    task = _TASKS[name]
    kinds = ("thing_classes", "stuff_classes") if task == "panoptic" else ("classes",)
    classes = [
        {"id": number, "name": title} | ({"isthing": kind != "stuff_classes"} if kinds[1:] else {})
        for kind in kinds
        for number, title in arguments.dict_of(kind).items()
    ]
    height, width = arguments.numbers("image_size", int, 2)
    normalise = _Arguments(file.path, arguments.dict_of("image_normalize"))
    return LightlySettings(
        task=task,
        image_size=(height, width),
        mean=normalise.numbers("mean", float, 3),
        std=normalise.numbers("std", float, 3),
        classes=of_categories(classes, file.path.name),
        num_blocks=arguments.count("num_joint_blocks"),
    )


class _Arguments:
    """The arguments of a model's class; each is checked when it is read."""

    def __init__(self, path: Path, content: Any) -> None:
        self.path = path
        if not isinstance(content, dict):
            raise self.wrong("it has no model_init_args", "a dict")
        self.content = content

    def wrong(self, finding: str, expected: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"{self.path} has weights in LightlyTrain's layout, but {finding}; expected "
            f"{expected}.",
            "Give the file that LightlyTrain exports, exported_models/exported_best.pt, unchanged.",
        )

    def dict_of(self, name: str) -> dict[Any, Any]:
        value = self.content.get(name)
        if not isinstance(value, dict):
            raise self.wrong(f"{name} is {shortened(value)}", "a dict")
        return value

    def optional_dict(self, name: str) -> dict[Any, Any]:
        return {} if self.content.get(name) is None else self.dict_of(name)

    def count(self, name: str) -> int:
        value = self.content.get(name)
        if type(value) is not int or value < 1:
            raise self.wrong(f"{name} is {shortened(value)}", "a number above 0")
        return value

    def numbers(self, name: str, kind: type, length: int) -> tuple[Any, ...]:
        """So many positive numbers, of a list or tuple."""
        value = self.content.get(name)
        if (
            not isinstance(value, list | tuple)
            or len(value) != length
            or not all(type(n) in (int, kind) and math.isfinite(n) and n > 0 for n in value)
        ):
            raise self.wrong(f"{name} is {shortened(value)}", f"{length} positive numbers")
        return tuple(map(kind, value))
