"""Dinov3Config and EomtDinov3Config: the sizes of a backbone and of a model, and its class names.

Other modules take all sizes of a model from these classes. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from reference_model.allowed import ROPE_TYPE, check, is_int, refusal
from reference_model.files import fetch_file, json_text, read_json_object, write_json_object

CONFIG_NAME = "config.json"
ROPE_THETA = 100.0  # DINOv3's


@dataclass(kw_only=True)
class Dinov3Config:
    """Configuration of a DINOv3 backbone: the keys of DINOv3ViTConfig that define the network.

    The names are those of transformers. Invalid values raise ValueError with the key, the value
    and what was expected. No attribute can be set: the weights of a model depend on its config.

    Attributes:
        hidden_size: width of a token.
        intermediate_size: width inside the MLP.
        hidden_act: activation of the layers' MLPs, as transformers names it.
        patch_size: side of a square patch, in pixels; a power of two.
        num_register_tokens: tokens between the class token and the patches.
        use_gated_mlp: whether the MLP has a gate.
        query_bias, key_bias, value_bias, proj_bias, mlp_bias: whether that projection has a bias.
        rope_parameters: `rope_type`, always "default", and `rope_theta`, base of the frequencies.
        attention_dropout, drop_path_rate, initializer_range, layerscale_value, pos_embed_shift,
            pos_embed_jitter, pos_embed_rescale: for training only.
    """

    model_type: ClassVar[str] = "dinov3_vit"

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    layerscale_value: float = 1.0
    patch_size: int = 16
    num_channels: int = 3
    num_register_tokens: int = 0
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    pos_embed_shift: float | None = None
    pos_embed_jitter: float | None = None
    pos_embed_rescale: float | None = 2.0

    def __post_init__(self) -> None:
        check(vars(self))
        default = {"rope_type": ROPE_TYPE, "rope_theta": ROPE_THETA}
        self._set("rope_parameters", default | dict(self.rope_parameters))
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise refusal("hidden_size", self.hidden_size, f"a multiple of {heads} heads")
        if self.head_size % 4:
            expected = f"{heads} heads times a multiple of 4: sine and cosine of two coordinates"
            raise refusal("hidden_size", self.hidden_size, expected)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type in ("float", "float | None") and is_int(value):  # JSON may have 1 for 1.0
                self._set(entry.name, float(value))

    def __setattr__(self, name: str, value: object) -> None:
        """Sets a field while an instance is created; raises AttributeError afterwards."""
        if name in vars(self) or name not in self.__dataclass_fields__:
            kind = type(self).__name__
            raise AttributeError(
                f"{name} of a config cannot be set; to load one with another value: "
                f"{kind}.from_pretrained(..., {name}=...), to copy one: dataclasses.replace"
            )
        self._set(name, value)

    def _set(self, name: str, value: object) -> None:
        """Replaces the value of a field while an instance is created."""
        object.__setattr__(self, name, value)

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
        """The configuration that a parsed config.json describes; other keys are left out.

        A top-level `rope_theta` is used if `rope_parameters` has none, as in transformers'
        DINOv3ViTConfig and in configs written before transformers 5.

        Raises:
            ValueError: a size is missing, or a value is invalid, also of a key that only
                EomtDinov3Config has.
        """
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise refusal("model_type", model_type, f'"{cls.model_type}"')
        nullable = ("rope_parameters", "rope_theta", "id2label", "num_labels")  # null: the default
        values = {k: v for k, v in values.items() if v is not None or k not in nullable}
        check(values)
        older = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
        values["rope_parameters"] = older | dict(values.get("rope_parameters", {}))
        own = {entry.name: entry for entry in fields(cls) if entry.name != "extra"}
        for name, entry in own.items():
            if entry.default is entry.default_factory is MISSING and name not in values:
                raise ValueError(f"it lacks {name}")
        return cls(**{key: value for key, value in values.items() if key in own})


@dataclass(kw_only=True)
class EomtDinov3Config(Dinov3Config):
    """Configuration of an EoMT-DINOv3 model: the keys of transformers' EomtDinov3Config.

    Invalid values raise ValueError with the key, the value and what was expected.

    Attributes:
        hidden_act: activation of the layers' MLPs only; mask head and upscaling use GELU.
        image_size: side of a square, or (height, width), in pixels, as in training. The network
            itself takes any multiples of `patch_size`.
        num_blocks: how many of the last layers also see the queries.
        num_upscale_blocks: how many times the patch grid is doubled before masks are computed
            from it; None applies the original's rule, max(1, log2(patch_size) - 2)
            (github.com/tue-mps/eomt models/eomt.py).
        no_object_weight: no_object_coefficient in github.com/tue-mps/eomt
            training/mask_classification_panoptic.py.
        num_labels: number of classes, without "no object"; by default that of `id2label`.
        id2label: class names by class id; by default unnamed ones, two unless `num_labels` says
            how many.
        stuff_classes: ids of the classes without instances; None if they are unknown.
        extra: other keys of a config.json, kept unchanged.
    """

    model_type: ClassVar[str] = "eomt_dinov3"

    # A config.json may leave out values that equal the defaults of its class in transformers, so
    # the defaults here are those of the same class there. EomtDinov3Config's differ in these:
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    layer_norm_eps: float = 1e-6
    num_register_tokens: int = 4

    hidden_dropout_prob: float = 0.0
    image_size: int | tuple[int, int] = 640
    num_queries: int = 200
    num_blocks: int = 4
    # None applies the rule; __post_init__ replaces it by an int
    num_upscale_blocks: int = None  # type: ignore[assignment]
    no_object_weight: float = 0.1
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    train_num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    # of these two, one follows from the other; __post_init__ replaces None
    num_labels: int = None  # type: ignore[assignment]
    id2label: Mapping[int, str] = None  # type: ignore[assignment]
    stuff_classes: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.id2label is None:
            count = 2 if self.num_labels is None else self.num_labels
            check({"num_labels": count})
            self._set("id2label", unnamed_labels(count))
        check({"id2label": self.id2label})
        if self.num_labels is None:
            self._set("num_labels", len(self.id2label))
        super().__post_init__()
        if self.num_labels != len(self.id2label):
            expected = f"the {len(self.id2label)} of id2label"
            raise refusal("num_labels", self.num_labels, expected)
        if self.num_upscale_blocks is None:
            self._set("num_upscale_blocks", max(1, self.patch_size.bit_length() - 1 - 2))
        if self.num_blocks > self.num_hidden_layers:
            expected = f"at most the {self.num_hidden_layers} hidden layers"
            raise refusal("num_blocks", self.num_blocks, expected)
        if any(side % self.patch_size for side in self.input_size):
            expected = f"multiples of patch_size {self.patch_size}"
            raise refusal("image_size", self.image_size, expected)
        self._set("id2label", {int(index): label for index, label in self.id2label.items()})
        if not self.id2label.keys() >= set(self.stuff_classes or ()):
            raise refusal("stuff_classes", self.stuff_classes, f"ids below {self.num_labels}")
        for name in ("image_size", "stuff_classes"):  # lists if they come from JSON
            if isinstance(value := getattr(self, name), list):
                self._set(name, tuple(value))

    @property
    def input_size(self) -> tuple[int, int]:
        """`image_size` as (height, width) in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def label2id(self) -> dict[str, int]:
        return {label: index for index, label in self.id2label.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **settings: Any) -> Self:
        """The configuration that a parsed config.json describes.

        As for a backbone. Other keys are kept in `extra`.

        Args:
            values: the parsed file.
            settings: attributes that replace those of the file. Where they name other classes, or
                another number of them, the file's `stuff_classes` do not apply. `label2id` is not
                needed: it follows from `id2label`.

        Raises:
            ValueError: a value is invalid.
            TypeError: there is no such attribute.
        """
        known = {entry.name for entry in fields(cls)} - {"extra"} | {"label2id"}
        if unknown := sorted(settings.keys() - known):
            raise TypeError(f"{cls.__name__} has no {', '.join(unknown)}")
        if settings:
            config = cls.from_dict(values)
            values = config.to_dict()
            named = settings.get("id2label", config.id2label)
            count = settings.get("num_labels", config.num_labels)
            if named != config.id2label or count != config.num_labels:
                values = {k: v for k, v in values.items() if k not in ("id2label", "stuff_classes")}
            values = {**values, **settings}
        known |= {"model_type", "rope_theta"}
        extra = {key: value for key, value in values.items() if key not in known}
        return replace(super().from_dict(values), extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json; `from_dict` turns it into an equal configuration."""
        values = asdict(self)
        extra = values.pop("extra")
        del values["num_labels"]  # as in transformers: id2label says it
        if self.stuff_classes is None:
            del values["stuff_classes"]
        return {
            **extra,
            **values,
            "label2id": self.label2id,
            "model_type": self.model_type,
        }

    def to_json_string(self) -> str:
        """The text of config.json."""
        return json_text(self.to_dict())

    @classmethod
    def from_file(cls, path: str | Path, **settings: Any) -> Self:
        """The configuration in a config.json; settings as in `from_dict`.

        Raises:
            OSError: there is no such regular file.
            ValueError: the file is not a JSON object, or a value is invalid; the message names the
                file.
        """
        try:
            return cls.from_dict(read_json_object(path), **settings)
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
        **settings: Any,
    ) -> Self:
        """The configuration in a folder or a Hub repository.

        Parameters as in huggingface_hub, and settings as in `from_dict`.

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
            ),
            **settings,
        )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes config.json to a folder, which is created if it does not exist."""
        write_json_object(Path(save_directory) / CONFIG_NAME, self.to_dict())


def unnamed_labels(count: int) -> dict[int, str]:
    """Placeholders for class names, the same as transformers'."""
    return {index: f"LABEL_{index}" for index in range(count)}
