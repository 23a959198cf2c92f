"""The checkpoints with names in `eomt-convert`: TU/e's published ones and the offline ones.

Data from the model zoo (https://github.com/tue-mps/eomt, model_zoo/dinov3.md).
"""

import difflib
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from converter.class_names import ClassNames, of_dataset, unnamed
from converter.errors import UsageError
from converter.places import HubSource, LocalSource

Task = Literal["panoptic", "instance", "semantic"]


@dataclass(frozen=True)
class Metric:
    """A published figure.

    Attributes:
        dataset: the data that it was measured on.
        name: PQ, mask AP or mIoU.
        value: in percent.
    """

    dataset: str
    name: str
    value: float


@dataclass(frozen=True)
class Checkpoint:
    """One entry of the catalogue.

    Attributes:
        name: the name that ``--checkpoint`` takes.
        task: what the model segments.
        image_size: (height, width) in pixels.
        delta: the Hub repository of the delta weights, or a folder of the offline checkpoints.
        backbone: the same for the DINOv3 backbone in transformers' layout.
        aliases: other names: the repositories that it is or was published under.
        labels: the file of class names in the package; None if the classes have no names.
        stuff: ids of stuff classes, if there is no file of class names that has them.
        metric: the published figure, if there is one.
        note: a remark for users, in the table of the catalogue.
        offline: whether its files are part of the package.
    """

    name: str
    task: Task
    image_size: tuple[int, int]
    delta: str
    backbone: str
    aliases: tuple[str, ...] = ()
    labels: str | None = None
    stuff: tuple[int, ...] = ()
    metric: Metric | None = None
    note: str = ""
    offline: bool = False

    @property
    def slug(self) -> str:
        """Its name as a part of repository names, such as coco-panoptic-large-640."""
        prefix = "tue-mps/eomt-dinov3-"
        published = (name.removeprefix(prefix) for name in self.aliases if name.startswith(prefix))
        return next(published, self.name.replace("_", "-"))

    @property
    def recorded(self) -> Path | None:
        """The folder of its recorded outputs, if they are part of the package."""
        return fixtures() / self.name if self.offline else None

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON shows it."""
        return {
            "name": self.name,
            "task": self.task,
            "image_size": list(self.image_size),
            "offline": self.offline,
            "delta": None if self.offline else self.delta,
            "backbone": None if self.offline else self.backbone,
            "aliases": list(self.aliases),
            "metric": asdict(self.metric) if self.metric else None,
            "note": self.note,
        }

    def source(self, role: Literal["backbone", "delta"]) -> LocalSource | HubSource:
        """Where its backbone or its delta comes from."""
        place = self.backbone if role == "backbone" else self.delta
        return LocalSource(fixtures() / place) if self.offline else HubSource(place)

    def class_names(self, count: int) -> ClassNames:
        """Its class names; ``count`` placeholders if the classes have no names."""
        return of_dataset(self.labels) if self.labels else unnamed(count, self.stuff)


def fixtures() -> Path:
    """The folder of the offline checkpoints: inside the installed package, or the checkout's."""
    package = Path(str(resources.files("converter")))
    installed = package / "fixtures"
    return installed if installed.is_dir() else package.parent / "fixtures"


def _published(
    name: str, task: Task, size: int, backbone: str, metric: Metric, *, repo_dataset: str
) -> Checkpoint:
    scale, pixels = name.split("_")[-2:]
    return Checkpoint(
        name=name,
        task=task,
        image_size=(size, size),
        delta=f"tue-mps/{repo_dataset}_{task}_eomt_{scale}_{pixels}_dinov3",
        backbone=f"facebook/dinov3-{backbone}-pretrain-lvd1689m",
        aliases=tuple(
            alias
            for dataset in dict.fromkeys((repo_dataset, name.split("_")[0]))
            for alias in (
                f"tue-mps/{dataset}_{task}_eomt_{scale}_{pixels}_dinov3",
                f"tue-mps/eomt-dinov3-{dataset}-{task}-{scale}-{pixels}",
                f"tue-mps/{dataset}_{task}_eomt_dinov3_{scale}_{pixels}",
            )
        ),
        labels="ade20k_semantic" if task == "semantic" else f"coco_{task}",
        metric=metric,
    )


def _coco(
    task: Task, scale: str, size: int, backbone: str, metric: str, value: float
) -> Checkpoint:
    dataset = "COCO panoptic val2017" if task == "panoptic" else "COCO instances val2017"
    return _published(
        f"coco_{task}_{scale}_{size}",
        task,
        size,
        backbone,
        Metric(dataset, metric, value),
        repo_dataset="coco",
    )


def _offline(
    name: str,
    task: Task,
    image_size: tuple[int, int],
    note: str,
    labels: str | None = None,
    stuff: tuple[int, ...] = (),
) -> Checkpoint:
    return Checkpoint(
        name=name,
        task=task,
        image_size=image_size,
        delta=f"{name}/delta",
        backbone=f"{name}/backbone",
        labels=labels,
        stuff=stuff,
        note=note,
        offline=True,
    )


_RANDOM = "offline, random weights: for trying the tool, not for segmenting"

CATALOG: tuple[Checkpoint, ...] = (
    _coco("panoptic", "small", 640, "vits16", "PQ", 47.2),
    _coco("panoptic", "base", 640, "vitb16", "PQ", 53.1),
    _coco("panoptic", "large", 640, "vitl16", "PQ", 56.8),
    _coco("panoptic", "large", 1280, "vitl16", "PQ", 58.9),
    _published(
        "ade20k_semantic_large_512",
        "semantic",
        512,
        "vitl16",
        Metric("ADE20K val", "mIoU", 59.5),
        repo_dataset="ade",
    ),
    _coco("instance", "large", 640, "vitl16", "mask AP", 45.9),
    _coco("instance", "large", 1280, "vitl16", "mask AP", 49.9),
    _offline(
        "shapes_panoptic_128",
        "panoptic",
        (128, 128),
        "offline, a tiny model trained on random scenes of shapes",
        labels="shapes_panoptic",
    ),
    _offline("tiny_panoptic_64", "panoptic", (64, 64), _RANDOM, stuff=(4, 5, 6)),
    _offline("tiny_panoptic_48x80", "panoptic", (48, 80), _RANDOM, stuff=(3, 4)),
    _offline("tiny_semantic_48", "semantic", (48, 48), _RANDOM),
    _offline("tiny_instance_64_gated", "instance", (64, 64), _RANDOM),
)


def find(name: str) -> Checkpoint:
    """The entry with a name.

    An entry's own name, its delta repository, and the names that it is published under are all
    accepted, with or without ``tue-mps/``, in upper or lower case, with ``-`` or ``_``.

    Raises:
        UsageError: no entry has this name; the message suggests similar names.
    """
    known = {
        _plain(alias): checkpoint
        for checkpoint in CATALOG
        for alias in (checkpoint.name, *checkpoint.aliases)
    }
    if checkpoint := known.get(_plain(name)):
        return checkpoint
    near = difflib.get_close_matches(_plain(name), known, n=6, cutoff=0.5)
    suggested = list(dict.fromkeys(known[alias].name for alias in near))[:3]
    raise UsageError(
        f"There is no checkpoint {name!r} in the catalogue.",
        f"Did you mean {' or '.join(suggested)}?"
        if suggested
        else "eomt-convert list shows the catalogue.",
    )


def _plain(name: str) -> str:
    return name.strip().lower().removeprefix("tue-mps/").replace("-", "_")


def find_named(name: object) -> Checkpoint | None:
    """The catalogue's entry with a name; None if there is none."""
    try:
        return find(name) if isinstance(name, str) else None
    except UsageError:
        return None
