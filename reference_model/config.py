"""EomtDinov3Config: the sizes of a model and the names of its classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Self, TypeGuard

from huggingface_hub.constants import CONFIG_NAME

from reference_model.activations import ACTIVATIONS
from reference_model.files import fetch_file, read_json_object, write_json_object

MODEL_TYPE = "eomt_dinov3"
ROPE_TYPE = "default"
ROPE_THETA = 100.0  # DINOv3's

# The smallest and the largest whole numbers. The largest DINOv3, ViT-7B, has hidden_size 4096,
# intermediate_size 8192, 40 layers, 32 heads, 4 register tokens and patches of 16; EoMT has up to
# 200 queries and pictures of 1280. There is room for ten times as much and more. What is larger
# still is no model: to build it takes all memory, or never ends.
LIMITS = {
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 2**10),
    "intermediate_size": (1, 2**18),
    "num_channels": (1, 2**8),
    "patch_size": (1, 2**10),
    "num_register_tokens": (0, 2**10),
    "num_queries": (1, 2**14),
    "num_blocks": (1, 1000),
    "num_upscale_blocks": (1, 10),  # log2 of the largest patch_size: masks of single pixels
    "train_num_points": (1, 2**24),
    "num_labels": (1, 2**16),
    "image_size": (1, 2**14),
}
MAX_NUMBER = 1e12  # of numbers that need not be whole; float32 has room for their squares
_SWITCHES = ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "use_gated_mlp")
_RATES = ("hidden_dropout_prob", "attention_dropout", "drop_path_rate")
_NUMBERS = (
    "initializer_range",
    "layer_norm_eps",
    "layerscale_value",
    "no_object_weight",
    "class_weight",
    "mask_weight",
    "dice_weight",
)


@dataclass(frozen=True)
class EomtDinov3Config:
    """Configuration of an EoMT-DINOv3 model: the keys of transformers' EomtDinov3Config.

    Values that cannot work raise ValueError with the key and the value.

    Attributes:
        image_size: side of a square, or (height, width), in pixels, as in training. The network
            itself takes any multiples of `patch_size`.
        num_blocks: how many of the last layers also see the queries.
        num_upscale_blocks: doublings of the patch grid before the masks are read from it;
            None asks for the original's rule, max(1, log2(patch_size) - 2).
        hidden_act: activation of the layers' MLPs only; mask head and upscaling use GELU.
        rope_parameters: `rope_type`, always "default", and `rope_theta`, the frequencies' base.
        id2label: class names by class id.
        stuff_classes: ids of the classes without instances, where they are known.
        extra: the keys of a config.json that are not ours, carried along.
    """

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_dropout: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    layerscale_value: float = 1.0
    image_size: int | tuple[int, int] = 640
    patch_size: int = 16
    num_channels: int = 3
    num_register_tokens: int = 4
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    rope_parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": ROPE_TYPE, "rope_theta": ROPE_THETA}
    )
    pos_embed_shift: float | None = None
    pos_embed_jitter: float | None = None
    pos_embed_rescale: float | None = 2.0
    num_queries: int = 200
    num_blocks: int = 4
    # None asks for the rule, which __post_init__ fills in: an int ever after
    num_upscale_blocks: int = None  # type: ignore[assignment]
    no_object_weight: float = 0.1
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    train_num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    id2label: Mapping[int, str] = field(default_factory=lambda: _unnamed_labels(2))
    stuff_classes: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_rope()
        self._check_classes()
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type in ("float", "float | None") and is_int(value):  # JSON may say 1 for 1.0
                object.__setattr__(self, entry.name, float(value))

    @property
    def num_labels(self) -> int:
        """Number of classes, "no object" not counted."""
        return len(self.id2label)

    @property
    def input_size(self) -> tuple[int, int]:
        """`image_size` as (height, width) in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def label2id(self) -> dict[str, int]:
        return {label: index for index, label in self.id2label.items()}

    @property
    def rope_theta(self) -> float:
        return float(self.rope_parameters["rope_theta"])

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_prefix_tokens(self) -> int:
        """The class token and the register tokens."""
        return 1 + self.num_register_tokens

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that a parsed config.json describes.

        A top-level `rope_theta` stands for `rope_parameters` where there are none, as in configs
        written before transformers 5; `num_labels` stands for `id2label`.

        Raises:
            ValueError: a value cannot work.
        """
        values = dict(values)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise refusal("model_type", model_type, f"this is the configuration of {MODEL_TYPE}")

        theta = values.pop("rope_theta", None)
        given = values.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise refusal("rope_parameters", given, "an object")
        default = {"rope_type": ROPE_TYPE, "rope_theta": ROPE_THETA if theta is None else theta}
        values["rope_parameters"] = default | dict(given)

        values.pop("label2id", None)  # id2label says the same
        num_labels = values.pop("num_labels", None)
        if num_labels is not None:
            _check_whole("num_labels", num_labels)
        if values.get("id2label") is None:
            values["id2label"] = _unnamed_labels(num_labels or 2)

        own = {entry.name for entry in fields(cls)} - {"extra"}
        config = cls(
            **{key: value for key, value in values.items() if key in own},
            extra={key: value for key, value in values.items() if key not in own},
        )
        if num_labels not in (None, config.num_labels):
            raise refusal("num_labels", num_labels, f"the {config.num_labels} of id2label")
        return config

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: `from_dict` gives back an equal configuration."""
        values = asdict(self)
        extra = values.pop("extra")
        if self.stuff_classes is None:
            del values["stuff_classes"]
        return {
            **extra,
            **values,
            "label2id": self.label2id,
            "model_type": MODEL_TYPE,
        }

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The configuration in a config.json.

        Raises:
            OSError: there is no such regular file.
            ValueError: the file is not a JSON object, or a value cannot work; names the file.
        """
        try:
            return cls.from_dict(read_json_object(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """The config.json of a folder or a Hub repository; parameters as everywhere on the Hub.

        Raises:
            FileNotFoundError: the folder has no config.json.
            ValueError: as in `from_file`.
        """
        return cls.from_file(
            fetch_file(
                pretrained_model_name_or_path,
                CONFIG_NAME,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes config.json into a folder, which is made if need be."""
        write_json_object(Path(save_directory) / CONFIG_NAME, self.to_dict())

    def _check_sizes(self) -> None:
        if self.num_upscale_blocks is None and is_int(self.patch_size) and self.patch_size > 0:
            rule = max(1, self.patch_size.bit_length() - 1 - 2)
            object.__setattr__(self, "num_upscale_blocks", rule)
        for key in LIMITS:
            if key not in ("num_labels", "image_size"):
                _check_whole(key, getattr(self, key))
        for key in _SWITCHES:
            self._require(key, lambda value: isinstance(value, bool), "true or false")
        for key in _RATES:
            self._require(key, lambda p: is_number(p) and 0 <= p < 1, "a number from 0 to below 1")
        for key in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):
            self._require(
                key,
                lambda value: value is None or (is_number(value) and value > 0),
                "a positive number or null",
            )
        for key in _NUMBERS:
            self._require(
                key,
                lambda value: is_number(value) and value >= 0,
                f"a number from 0 to {MAX_NUMBER:g}",
            )
        self._require(
            "oversample_ratio", lambda value: is_number(value) and value >= 1, "a number from 1"
        )
        self._require(
            "importance_sample_ratio",
            lambda value: is_number(value) and 0 <= value <= 1,
            "a number from 0 to 1",
        )
        known = ", ".join(sorted(ACTIVATIONS))
        self._require("hidden_act", lambda name: name in list(ACTIVATIONS), f"one of {known}")

        heads, layers, patch_size = (
            self.num_attention_heads,
            self.num_hidden_layers,
            self.patch_size,
        )
        self._require("hidden_size", lambda n: n % heads == 0, f"a multiple of {heads} heads")
        self._require(
            "hidden_size",
            lambda n: n // heads % 4 == 0,
            f"{heads} heads times a multiple of 4: sine and cosine of two coordinates",
        )
        self._require("patch_size", lambda n: n.bit_count() == 1, "a power of two")
        self._require("num_blocks", lambda n: n <= layers, f"at most the {layers} hidden layers")

        largest = LIMITS["image_size"][1]
        sides: tuple[Any, ...] = (
            tuple(self.image_size)
            if isinstance(self.image_size, list | tuple)
            else (self.image_size,) * 2
        )
        self._require(
            "image_size",
            lambda _: (
                len(sides) == 2
                and all(is_int(n) and 0 < n <= largest and n % patch_size == 0 for n in sides)
            ),
            f"a positive multiple of patch_size {patch_size} up to {largest:,}, or two as "
            "[height, width]",
        )
        if not is_int(self.image_size):
            object.__setattr__(self, "image_size", sides)

    def _check_rope(self) -> None:
        for key, value in self.rope_parameters.items():
            if key not in ("rope_type", "rope_theta"):
                raise refusal(f"rope_parameters.{key}", value, "rope_type and rope_theta only")
        rope_type: object = self.rope_parameters.get("rope_type")
        theta: Any = self.rope_parameters.get("rope_theta")
        if rope_type != ROPE_TYPE:
            raise refusal("rope_parameters.rope_type", rope_type, f'only "{ROPE_TYPE}" is known')
        if not (is_number(theta) and theta > 0):
            expected = f"a positive number up to {MAX_NUMBER:g}"
            raise refusal("rope_parameters.rope_theta", theta, expected)

    def _check_classes(self) -> None:
        try:
            labels = {int(index): label for index, label in self.id2label.items()}
        except (AttributeError, TypeError, ValueError):
            labels = {}
        if not labels or sorted(labels) != list(range(len(labels))):
            raise refusal("id2label", self.id2label, "a name for each class id from 0 on")
        most = LIMITS["num_labels"][1]
        if len(labels) > most:
            raise refusal("id2label", self.id2label, f"at most {most:,} classes")
        for index, label in labels.items():
            if not _is_text(label):
                raise refusal(f"id2label.{index}", label, "a name, in valid Unicode")
        object.__setattr__(self, "id2label", labels)

        if self.stuff_classes is not None:
            self._require(
                "stuff_classes",
                lambda ids: (
                    isinstance(ids, list | tuple)
                    and all(is_int(index) and index in labels for index in ids)
                ),
                f"a list of class ids below {len(labels)}",
            )
            object.__setattr__(self, "stuff_classes", tuple(self.stuff_classes))

    def _require(self, key: str, works: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, key)
        if not works(value):
            raise refusal(key, value, expected)


def refusal(key: str, value: object, expected: str) -> ValueError:
    return ValueError(f"{key} is {shortened(value)}; expected {expected}")


def _check_whole(key: str, value: object) -> None:
    low, high = LIMITS[key]
    if not (is_int(value) and low <= value <= high):
        raise refusal(key, value, f"an integer from {low} to {high:,}")


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a number that can be computed with: no NaN, nothing endless."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -MAX_NUMBER <= value <= MAX_NUMBER
    )


def _is_text(value: object) -> bool:
    """Whether a value is text that can be written: JSON may hold halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _unnamed_labels(count: int) -> dict[int, str]:
    """Class names as transformers makes them up."""
    return {index: f"LABEL_{index}" for index in range(count)}
