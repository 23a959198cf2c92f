"""Reads a backbone's or model's config.json; makes the content of a model's two config files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from converter.catalog import Task
from converter.class_names import ClassNames
from converter.errors import UnreadableFileError, UsageError
from converter.files import read_json_object
from reference_model.config import Dinov3Config, EomtDinov3Config

# safetensors' names of the element types that a model may have
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Dtype = Literal["float32", "bfloat16", "float16"]

# the files that determine, together with the tensors, what a model computes
PREPROCESSOR = "preprocessor_config.json"
CONFIGS = ("config.json", PREPROCESSOR)

# ImageNet's statistics, as github.com/tue-mps/eomt models/vit.py has them
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

# types of 16 bits, the coarser first
_ROUNDED: tuple[Dtype, ...] = ("bfloat16", "float16")

NO_OBJECT_WEIGHT = EomtDinov3Config.no_object_weight

_Config = TypeVar("_Config", bound=Dinov3Config)


def coarsest(types: Iterable[str]) -> Dtype | None:
    """The coarsest 16-bit type among some; None if there is none."""
    found = set(types)
    return next((each for each in _ROUNDED if each in found), None)


def check_image_size(size: tuple[int, int] | None, patch_size: int) -> None:
    """Checks that an image size, if one is given, is a multiple of the patch size.

    Args:
        size: (height, width) in pixels.
        patch_size: in pixels.

    Raises:
        UsageError: it is not.
    """
    if size and (min(size) < 1 or any(side % patch_size for side in size)):
        raise UsageError(
            f"The image size is {size[0]}x{size[1]}; expected multiples of the patch size "
            f"{patch_size}."
        )


def read_backbone_config(path: Path) -> Dinov3Config:
    """Reads the config.json of a DINOv3 backbone in transformers' format.

    Raises:
        UnreadableFileError: it cannot be read, is for another kind of model, lacks a size, or has
            an unsupported value.
    """
    return _read(
        path,
        Dinov3Config,
        "Give the folder or repository of the DINOv3 backbone that the delta was made from.",
    )


def find_backbone_config(path: Path | None) -> Dinov3Config | None:
    """Reads the config.json of a backbone; None if it is missing or not in transformers' format.

    timm's repositories have a config.json in timm's format.

    Raises:
        UnreadableFileError: as in `read_backbone_config`.
    """
    if path and read_json_object(path).get("model_type") is not None:
        return read_backbone_config(path)
    return None


def read_model_config(path: Path) -> EomtDinov3Config:
    """Reads the config.json of a converted model.

    Raises:
        UnreadableFileError: it cannot be read, is for another kind of model, or has an unsupported
            value.
    """
    return _read(path, EomtDinov3Config, "Give the folder of an EoMT-DINOv3 model.")


def read_config(path: Path) -> dict[str, Any]:
    """Reads the config.json of a model and returns all its keys, also unknown ones.

    Every command calls this before it builds anything from the numbers in the file.

    Raises:
        UnreadableFileError: it cannot be read, or has an unsupported value.
    """
    content = read_json_object(path)
    _parse(content, EomtDinov3Config, path)
    return content


def _read(path: Path, kind: type[_Config], remedy: str) -> _Config:
    content = read_json_object(path)
    if content.get("model_type") != kind.model_type:
        raise UnreadableFileError(
            f"model_type in {path} is {content.get('model_type')!r}, expected {kind.model_type!r}.",
            remedy,
        )
    return _parse(content, kind, path)


def _parse(content: Mapping[str, Any], kind: type[_Config], path: Path) -> _Config:
    try:
        return kind.from_dict(content)
    except ValueError as error:
        raise UnreadableFileError(f"{path}: {error}.") from error


def model_config(
    config: EomtDinov3Config,
    image_size: tuple[int, int] | None,
    classes: ClassNames,
    *,
    dtype: str = "float32",
    own: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of a converted model: an `EomtDinov3Config` as transformers 5.23 reads it.

    Values that only training and losses use are left out, so that transformers' defaults apply. The
    weight of "no object" is the exception, because criterion.empty_weight is made with it.

    Args:
        config: the sizes of the model.
        image_size: (height, width) in pixels; a square size is written as one number. None to
            keep the value in ``own``.
        classes: one name per class.
        dtype: of the weights.
        own: the config.json that came with the weights; its other values are kept.
    """
    values: dict[str, Any] = {
        "no_object_weight": config.no_object_weight,
        **{entry.name: getattr(config, entry.name) for entry in fields(Dinov3Config)},
        **(own or {}),
        "architectures": ["EomtDinov3ForUniversalSegmentation"],
        "model_type": config.model_type,
        "dtype": dtype,
        "num_queries": config.num_queries,
        "num_blocks": config.num_blocks,
        "num_upscale_blocks": config.num_upscale_blocks,
        "id2label": {str(i): name for i, name in enumerate(classes.names)},
        "label2id": {name: i for i, name in enumerate(classes.names)},
        "stuff_classes": list(classes.stuff or ()),
    }
    values.pop("rope_theta", None)
    if image_size is not None:
        height, width = image_size
        values["image_size"] = height if height == width else [height, width]
    return dict(sorted(values.items()))


def preprocessor_config(
    task: Task,
    image_size: tuple[int, int],
    *,
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
) -> dict[str, Any]:
    """The preprocessor_config.json of a converted model, for transformers' EomtImageProcessor.

    For panoptic and instance segmentation, pictures are resized to fit the image size, and padded.
    For semantic segmentation, the shorter side is resized to the image size, and windows slide
    along the longer side, as in the original's evaluation (github.com/tue-mps/eomt
    training/mask_classification_semantic.py).
    """
    height, width = image_size
    windows = task == "semantic"
    if height != width:
        size: dict[str, int | None] = {"height": height, "width": width}
    else:
        size = {"shortest_edge": height, "longest_edge": None if windows else height}
    return {
        "do_normalize": True,
        "do_pad": not windows,
        "do_rescale": True,
        "do_resize": True,
        "do_split_image": windows,
        "ignore_index": None,
        "image_mean": list(mean),
        "image_processor_type": "EomtImageProcessor",
        "image_std": list(std),
        "resample": 2,  # PIL's number for bilinear
        "rescale_factor": 1 / 255,
        "size": size,
    }
