"""The configuration files: a backbone's config.json read, a model's two files written."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal, get_args

from converter.catalog import Task
from converter.class_names import ClassNames
from converter.errors import UnreadableFileError
from converter.files import read_json_object

# safetensors' names of the element types that a model may have
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Dtype = Literal["float32", "bfloat16", "float16"]

# ImageNet's statistics, as github.com/tue-mps/eomt models/vit.py has them
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

# The smallest and the largest numbers of a config.json, with reasons in reference_model/config.py,
# whose own limits for whoever uses it alone are the same; it cannot be imported without torch.
LIMITS: Mapping[str, tuple[float, float]] = {
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 2**10),
    "intermediate_size": (1, 2**18),
    "num_channels": (1, 2**8),
    "patch_size": (1, 2**10),
    "num_register_tokens": (0, 2**10),
    "num_queries": (1, 2**14),
    "num_blocks": (1, 1000),
    "num_upscale_blocks": (1, 10),
    "train_num_points": (1, 2**24),
    "num_labels": (1, 2**16),
    "image_size": (1, 2**14),
}
MAX_NUMBER = 1e12

# no_object_coefficient in github.com/tue-mps/eomt training/mask_classification_panoptic.py
NO_OBJECT_WEIGHT = 0.1


@dataclass(frozen=True)
class BackboneConfig:
    """What a DINOv3 backbone's config.json says, in transformers' names.

    Attributes:
        hidden_size: width of a token.
        intermediate_size: width inside the MLP.
        num_hidden_layers: number of layers.
        num_attention_heads: heads of each layer's attention.
        patch_size: side of a square patch, in pixels; a power of two.
        num_channels: colour channels of a picture.
        num_register_tokens: register tokens between the class token and the patches.
        hidden_act: activation of the layers' MLP, as transformers names it.
        layer_norm_eps: epsilon of the backbone's layer norms.
        rope_theta: base of the rotary positions' frequencies.
        use_gated_mlp: whether the MLP has a gate.
        query_bias, key_bias, value_bias, proj_bias, mlp_bias: whether that projection has a bias.
        layerscale_value, initializer_range, attention_dropout, drop_path_rate, pos_embed_shift,
            pos_embed_jitter, pos_embed_rescale: for training only.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int = 16
    num_channels: int = 3
    num_register_tokens: int = 0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    use_gated_mlp: bool = False
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    layerscale_value: float = 1.0
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    drop_path_rate: float = 0.0
    pos_embed_shift: float | None = None
    pos_embed_jitter: float | None = None
    pos_embed_rescale: float | None = 2.0

    @property
    def size(self) -> tuple[int, int, bool]:
        """(hidden size, layers, gated MLP), which tells the published architectures apart."""
        return self.hidden_size, self.num_hidden_layers, self.use_gated_mlp

    @property
    def num_upscale_blocks(self) -> int:
        """Steps from the patch grid to the masks: max(1, log2(patch_size) - 2).

        Source: github.com/tue-mps/eomt models/eomt.py.
        """
        return max(1, int(math.log2(self.patch_size)) - 2)


# keys of a config.json that hold numbers
_NUMBERS = (
    {field.name for field in fields(BackboneConfig) if field.type not in ("bool", bool, str)}
    | LIMITS.keys()
    | {
        *("hidden_dropout_prob", "no_object_weight", "class_weight", "mask_weight", "dice_weight"),
        *("oversample_ratio", "importance_sample_ratio"),
    }
)


@dataclass(frozen=True)
class HeadSizes:
    """The sizes that EoMT adds to a backbone.

    Attributes:
        num_queries: learned queries.
        num_classes: classes without "no object".
        num_blocks: last layers that the queries take part in.
    """

    num_queries: int
    num_classes: int
    num_blocks: int


def read_backbone_config(path: Path) -> BackboneConfig:
    """Reads the config.json of a DINOv3 backbone in transformers' format.

    Raises:
        UnreadableFileError: it cannot be read, is of another model, or lacks or mistypes a value.
    """
    return _read_config(
        path,
        "dinov3_vit",
        "Give the folder or repository of the DINOv3 backbone that the delta was made from.",
    )


def find_backbone_config(path: Path | None) -> BackboneConfig | None:
    """Reads a config.json beside a backbone; None where there is none in transformers' format.

    timm's repositories have one of another kind.

    Raises:
        UnreadableFileError: as in `read_backbone_config`.
    """
    if path and read_json_object(path).get("model_type") is not None:
        return read_backbone_config(path)
    return None


def read_model_config(path: Path) -> BackboneConfig:
    """Reads what the config.json of a converted model says of its backbone.

    Raises:
        UnreadableFileError: it cannot be read, is of another model, or lacks or mistypes a value.
    """
    return _read_config(path, "eomt_dinov3", "Give the folder of an EoMT-DINOv3 model.")


def read_config(path: Path) -> dict[str, Any]:
    """Reads the config.json of a model or a backbone.

    Every command reads it here before anything is built of its numbers.

    Raises:
        UnreadableFileError: it cannot be read, or one of its numbers is out of bounds.
    """
    content = read_json_object(path)
    rope = content.get("rope_parameters")
    for key, value in (content | (rope if isinstance(rope, dict) else {})).items():
        if key not in _NUMBERS:
            continue
        low, high = LIMITS.get(key, (-MAX_NUMBER, MAX_NUMBER))
        for number in value if isinstance(value, list) else [value]:  # height and width
            if isinstance(number, int | float) and not low <= number <= high:  # NaN is neither
                raise UnreadableFileError(
                    f"{key} in {path} is {shortened(number)}; it must be from {low:,} to {high:,}."
                )
    return content


def _read_config(path: Path, model_type: str, remedy: str) -> BackboneConfig:
    content = read_config(path)
    if content.get("model_type") != model_type:
        raise UnreadableFileError(
            f"{path} is the configuration of a {content.get('model_type')!r} model, not of a "
            f"{model_type!r}.",
            remedy,
        )
    # transformers 5 keeps the base under rope_parameters, 4.56 beside the other values
    rope = content.get("rope_parameters") or {}
    if isinstance(rope, dict) and "rope_theta" in rope:
        content["rope_theta"] = rope["rope_theta"]
    values = {}
    for field in fields(BackboneConfig):
        if field.name in content:
            values[field.name] = _typed(content[field.name], field.type, field.name, path)
        elif field.default is MISSING:
            raise UnreadableFileError(f"{path} lacks {field.name}.")
    config = BackboneConfig(**values)
    _check_sizes(config, path)
    return config


def _typed(value: Any, annotation: Any, name: str, path: Path) -> Any:
    """A value that has the type of its field; whole numbers are numbers, booleans are not."""
    allowed = get_args(annotation) or (annotation,)
    allowed += (int,) if float in allowed else ()
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise UnreadableFileError(f"{name} in {path} is {value!r}, which is no possible value.")
    return value


def _check_sizes(config: BackboneConfig, path: Path) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise UnreadableFileError(
            f"{path} has {config.num_attention_heads} attention heads, which do not divide its "
            f"hidden_size {config.hidden_size}."
        )
    if config.patch_size & (config.patch_size - 1):
        raise UnreadableFileError(
            f"patch_size in {path} is {config.patch_size}; it must be a power of two."
        )


def model_config(
    backbone: BackboneConfig,
    heads: HeadSizes,
    image_size: tuple[int, int] | None,
    classes: ClassNames,
    *,
    dtype: str = "float32",
    own: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of a converted model: an `EomtDinov3Config` as transformers 5.23 reads it.

    Args:
        backbone: the backbone's configuration.
        heads: the sizes that EoMT adds.
        image_size: (height, width) in pixels; a square one is written as one number. None to
            keep the one of ``own``.
        classes: one name per class.
        dtype: of the weights.
        own: the config.json that the weights came with, whose other values are kept.
    """
    values: dict[str, Any] = {
        "no_object_weight": NO_OBJECT_WEIGHT,
        **asdict(backbone),
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_theta},
        **(own or {}),
        "architectures": ["EomtDinov3ForUniversalSegmentation"],
        "model_type": "eomt_dinov3",
        "dtype": dtype,
        "num_queries": heads.num_queries,
        "num_blocks": heads.num_blocks,
        "num_upscale_blocks": backbone.num_upscale_blocks,
        "id2label": {str(i): name for i, name in enumerate(classes.names)},
        "label2id": {name: i for i, name in enumerate(classes.names)},
        "stuff_classes": list(classes.stuff),
    }
    values.pop("rope_theta", None)
    if image_size is not None:
        height, width = image_size
        values["image_size"] = height if height == width else [height, width]
    return dict(sorted(values.items()))


def preprocessor_config(task: Task, image_size: tuple[int, int]) -> dict[str, Any]:
    """The preprocessor_config.json of a converted model, for transformers' EomtImageProcessor.

    Pictures for panoptic and instance segmentation are made to fit and padded. For semantic
    segmentation the shorter side is made to fit and windows slide along the longer one, as
    the original evaluates (github.com/tue-mps/eomt training/mask_classification_semantic.py).
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
        "image_mean": list(IMAGE_MEAN),
        "image_processor_type": "EomtImageProcessor",
        "image_std": list(IMAGE_STD),
        "resample": 2,  # PIL's number for bilinear
        "rescale_factor": 1 / 255,
        "size": size,
    }
