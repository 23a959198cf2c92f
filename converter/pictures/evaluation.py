"""Measures a model on a dataset, by the recipe in github.com/tue-mps/eomt training/."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converter.catalog import find_named
from converter.errors import EomtConvertError, UsageError
from converter.files import user_path
from converter.history import has_weights_of, read_history
from converter.hub.access import Access
from converter.job import Progress
from converter.models import (
    Compile,
    choose_device,
    fetch_model,
    load_model,
    repository_of,
    run_network,
)
from converter.pictures.datasets import (
    DATASETS,
    Dataset,
    Example,
    Instances,
    Segments,
    open_dataset,
)

if TYPE_CHECKING:
    import torch
    from torchmetrics import Metric

    from converter.models import Network
    from converter.pictures.metrics import Figures
    from reference_model import (
        EomtDinov3ForUniversalSegmentationOutput,
        EomtImageProcessor,
    )

    # makes the metric's input from a processor, a model's outputs and the example
    Predict = Callable[[EomtImageProcessor, EomtDinov3ForUniversalSegmentationOutput, Example], Any]

# training/mask_classification_panoptic.py: mask_thresh (which is used for class scores) and
# overlap_thresh; 0.5 is in its LightningModule.to_per_pixel_preds_panoptic
_THRESHOLD, _MASK_THRESHOLD, _OVERLAP_THRESHOLD = 0.8, 0.5, 0.8

# training/mask_classification_instance.py: eval_top_k_instances
_TOP_K = 100


@dataclass(frozen=True)
class Published:
    """A published figure and its difference from the measured one, in percent.

    Attributes:
        checkpoint: the catalogue's name of the model.
        dataset: the dataset that it was published for.
        metric: its name in `Evaluation.metrics`.
        value: what was published.
        difference: measured minus published.
    """

    checkpoint: str
    dataset: str
    metric: str
    value: float
    difference: float


@dataclass(frozen=True)
class Evaluation:
    """The result of measuring a model. The mean of no values is NaN.

    Attributes:
        model: a folder or a repository.
        dataset: one of DATASETS.
        images: number of pictures that counted.
        metrics: figures in percent by name, the most important one first.
        means_over: which classes the metrics are means over, and what the original does with the
            others.
        per_class: for each class, its name as ``class``, its figures in percent, and counts.
        published: the published figure, if the catalogue has one.
    """

    model: str
    dataset: str
    images: int
    metrics: Mapping[str, float]
    means_over: str
    per_class: tuple[Mapping[str, Any], ...]
    published: Published | None

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON shows it, with null for NaN."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "images": self.images,
            "metrics": _for_json(self.metrics),
            "means_over": self.means_over,
            "per_class": [_for_json(row) for row in self.per_class],
            "published": _for_json(vars(self.published)) if self.published else None,
        }


def evaluate(
    model: str | Path,
    dataset: str,
    data: str | Path,
    *,
    limit: int | None = None,
    device: str | None = None,
    compile: Compile | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Measures a model on a dataset.

    Under torchrun, or if torch.distributed is initialised, every process takes its share of the
    pictures, and all of them return the same figures.

    Args:
        model: folder of a converted model, or a Hub repository, owner/name or owner/name@revision.
        dataset: one of DATASETS.
        data: the folder that holds the dataset's zips, or their unpacked content.
        limit: number of pictures to use, from the first; by default all.
        device: as torch names it; by default a GPU if there is one, another one for each process.
        compile: the mode of torch.compile, ``default`` or ``max-autotune``; None for none.
        token: for the Hub; overrides HF_TOKEN and the login file.
        cache_dir: where downloads are kept.
        local_files_only: use only the cache.
        progress: called in the first process with a stage, the number of pictures done and of all.

    Raises:
        UsageError: there is no such dataset or device, or there are more processes than pictures.
        UnreadableFileError: the model or the data cannot be read.
        AccessError, HubUnavailableError: the repository cannot be reached.
        EomtConvertError: the model and the dataset differ in their number of classes, a library is
            missing, or the model cannot be compiled.
    """
    if dataset not in DATASETS:
        raise UsageError(f"There is no dataset {dataset!r}.", f"There are {', '.join(DATASETS)}.")
    folder = fetch_model(model, Access.of(token, cache_dir, local_files_only))
    place = choose_device(device)
    with (
        open_dataset(dataset, user_path(data)) as examples,
        _process_group(place) as (rank, processes),
    ):
        metric, predict = _recipe(dataset, examples)
        # the original's recipe, in float32
        network, processor = load_model(
            folder,
            device=str(place),
            dtype="float32",
            windows=dataset == "ade20k-semantic",
            compile=compile,
        )
        if len(examples.names) != network.config.num_labels:
            raise EomtConvertError(
                f"The model has {network.config.num_labels} classes, expected "
                f"{len(examples.names)} as in {data}.",
                "Evaluate a model on the dataset that it was trained on.",
            )
        indices = range(len(examples))[:limit]
        if len(indices) < processes:
            raise UsageError(
                f"There are {len(indices)} annotated pictures for {processes} processes."
            )
        for index in indices[rank::processes]:
            if rank == 0:
                progress("Evaluating", index, len(indices))
            example = examples.read(index)
            if example is not None:
                outputs = _run(network, processor, example)
                metric.update(predict(processor, outputs, example), example.target)
        if place.type == "cuda":
            metric.to(place)  # NCCL can only gather from GPUs
        figures: Figures = metric.compute()
    return Evaluation(
        str(model),
        dataset,
        figures.images,
        figures.overall,
        figures.means_over,
        tuple(
            {"class": name} | row
            for name, row in zip(examples.names, figures.per_class, strict=True)
        ),
        _find_published(model, folder, dataset, figures.overall),
    )


def is_first_process() -> bool:
    """Whether this is the first process under torchrun, which prints for all of them."""
    return os.environ.get("RANK", "0") == "0"


def _recipe(dataset: str, examples: Dataset) -> "tuple[Metric, Predict]":
    """The metric of a dataset, and the function that makes its predictions from outputs."""
    try:
        from converter.pictures import metrics
    except ModuleNotFoundError as error:
        raise EomtConvertError(
            f"Evaluation needs {error.name}, which is not installed.",
            "Install it: pip install 'eomt-convert[evaluate]'",
        ) from error

    classes = len(examples.names)
    if dataset == "coco-panoptic":
        predict = partial(_predict_segments, stuff_classes=examples.stuff)
        return metrics.PanopticQuality(classes, examples.stuff), predict
    if dataset == "coco-instance":
        return metrics.MaskAveragePrecision(classes), _predict_instances
    return metrics.MeanIoU(classes), _predict_classes


def _run(
    model: "Network", processor: "EomtImageProcessor", example: Example
) -> "EomtDinov3ForUniversalSegmentationOutput":
    import torch

    with torch.inference_mode():
        inputs = processor(images=example.image, return_tensors="pt").to(model.device)
        return run_network(model, inputs)


def _predict_segments(
    processor: "EomtImageProcessor",
    outputs: "EomtDinov3ForUniversalSegmentationOutput",
    example: Example,
    *,
    stuff_classes: tuple[int, ...],
) -> Segments:
    (result,) = processor.post_process_panoptic_segmentation(
        outputs,
        target_sizes=[_size(example)],
        threshold=_THRESHOLD,
        mask_threshold=_MASK_THRESHOLD,
        overlap_mask_area_threshold=_OVERLAP_THRESHOLD,
        stuff_classes=stuff_classes,
    )
    classes = tuple(segment["label_id"] for segment in result["segments_info"])
    return Segments(result["segmentation"].cpu().numpy(), classes, (False,) * len(classes))


def _predict_instances(
    processor: "EomtImageProcessor",
    outputs: "EomtDinov3ForUniversalSegmentationOutput",
    example: Example,
) -> Instances:
    from pycocotools import mask

    (result,) = processor.post_process_instance_segmentation(
        outputs, target_sizes=[_size(example)], top_k=_TOP_K, return_binary_maps=True
    )
    objects = result["segments_info"]
    # pycocotools reads columns: (height, width, objects), the height running fastest
    maps = np.asfortranarray(result["binary_maps"].cpu().numpy().transpose(1, 2, 0))
    return Instances(
        example.target.image_id,
        tuple(mask.encode(maps.view(np.uint8))),
        tuple(found["label_id"] for found in objects),
        (False,) * len(objects),
        tuple(found["score"] for found in objects),
    )


def _predict_classes(
    processor: "EomtImageProcessor",
    outputs: "EomtDinov3ForUniversalSegmentationOutput",
    example: Example,
) -> NDArray[np.int64]:
    (result,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[_size(example)])
    classes: NDArray[np.int64] = result.cpu().numpy()
    return classes


def _size(example: Example) -> tuple[int, int]:
    """(height, width) of the picture."""
    return example.image.height, example.image.width


@contextmanager
def _process_group(device: "torch.device") -> "Iterator[tuple[int, int]]":
    """Gives this process's rank and the number of processes that share the work."""
    import torch.distributed as dist

    joins = dist.is_torchelastic_launched() and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    finally:
        if joins:
            dist.destroy_process_group()


def _find_published(
    model: str | Path, folder: Path, dataset: str, metrics: Mapping[str, float]
) -> Published | None:
    """The published figure, if the model has the weights of a published checkpoint."""
    history = read_history(folder)
    entry = history.checkpoint if history else find_named(repository_of(model))
    if not (entry and entry.metric and dataset.endswith(entry.task)):
        return None
    if not has_weights_of(entry, history):
        return None
    metric = next(iter(metrics))
    value = entry.metric.value
    return Published(entry.name, entry.metric.dataset, metric, value, metrics[metric] - value)


def _for_json(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with null for NaN, rounded so that the order of summation does not matter."""
    return {
        name: (None if math.isnan(value) else round(value, 9))
        if isinstance(value, float)
        else value
        for name, value in figures.items()
    }
