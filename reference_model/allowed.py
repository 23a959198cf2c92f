"""The valid values of a configuration, in one table, and the error for any other value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as shortened
from typing import Any, NamedTuple, TypeGuard

# Published DINOv3 models use gelu, or silu if their MLPs are gated. swish is another name for silu;
# gelu_pytorch_tanh is an approximation of gelu that people choose for speed.
ACTIVATION_NAMES = ("gelu", "gelu_pytorch_tanh", "silu", "swish")
ROPE_TYPE = "default"
MAX_IMAGE_SIDE = 2**14  # pixels
MAX_NUMBER = 1e12  # for values that may be fractions; its square fits into float32
_MAX_LABELS = 2**16


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number from -MAX_NUMBER to MAX_NUMBER: neither NaN nor infinite."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -MAX_NUMBER <= value <= MAX_NUMBER
    )


def _is_image_size(value: object) -> bool:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return all(is_int(side) and 0 < side <= MAX_IMAGE_SIDE for side in sides)


def _are_labels(value: object) -> bool:
    """Whether the keys are the class ids from 0 on, as numbers or, as in JSON, as text."""
    try:
        ids = [int(index) for index in value] if isinstance(value, Mapping) else []
    except (TypeError, ValueError):
        return False
    return 0 < len(ids) <= _MAX_LABELS and sorted(ids) == list(range(len(ids)))


def _is_text(value: object) -> bool:
    """Whether a value is text that UTF-8 can encode: JSON may contain lone surrogates."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


class Allowed(NamedTuple):
    """The valid values of a field, in words and as a function that tests them."""

    expected: str
    works: Callable[[Any], bool]


def _integer(low: int, high: int) -> Allowed:
    return Allowed(f"an integer from {low} to {high:,}", lambda n: is_int(n) and low <= n <= high)


def _number(low: float, high: float = MAX_NUMBER) -> Allowed:
    return Allowed(
        f"a number from {low:g} to {high:g}", lambda x: is_number(x) and low <= x <= high
    )


def _or_null(allowed: Allowed) -> Allowed:
    return Allowed(f"{allowed.expected}, or null", lambda x: x is None or allowed.works(x))


_POSITIVE = Allowed(f"a positive number up to {MAX_NUMBER:g}", lambda x: is_number(x) and x > 0)
_RATE = Allowed("a number from 0 to below 1", lambda x: is_number(x) and 0 <= x < 1)
_SWITCH = Allowed("true or false", lambda x: isinstance(x, bool))

# The valid values of each field by itself; the classes that declare fields check how they must fit
# together. The largest DINOv3, ViT-7B, has hidden_size 4096, intermediate_size 8192, 40 layers, 32
# heads, 4 register tokens and patches of 16; EoMT has up to 200 queries and pictures of 1280. The
# limits allow at least ten times as much. Building a model that is larger still would use up all
# memory, or never end.
ALLOWED: Mapping[str, Allowed] = {
    "hidden_size": _integer(1, 2**16),
    "num_hidden_layers": _integer(1, 1000),
    "num_attention_heads": _integer(1, 2**10),
    "intermediate_size": _integer(1, 2**18),
    "num_channels": _integer(1, 2**8),
    "num_register_tokens": _integer(0, 2**10),
    "num_queries": _integer(1, 2**14),
    "num_blocks": _integer(1, 1000),
    # up to log2 of the largest patch_size: one mask logit per pixel
    "num_upscale_blocks": _or_null(_integer(1, 10)),
    "train_num_points": _integer(1, 2**24),
    "num_labels": _integer(1, _MAX_LABELS),
    "patch_size": Allowed(
        "a power of two up to 1,024", lambda n: is_int(n) and 0 < n <= 1024 and n.bit_count() == 1
    ),
    "image_size": Allowed(
        f"a number of pixels from 1 to {MAX_IMAGE_SIDE:,}, or two as [height, width]",
        _is_image_size,
    ),
    "hidden_act": Allowed(
        f"a supported activation: {', '.join(ACTIVATION_NAMES)}", lambda x: x in ACTIVATION_NAMES
    ),
    "query_bias": _SWITCH,
    "key_bias": _SWITCH,
    "value_bias": _SWITCH,
    "proj_bias": _SWITCH,
    "mlp_bias": _SWITCH,
    "use_gated_mlp": _SWITCH,
    "hidden_dropout_prob": _RATE,
    "attention_dropout": _RATE,
    "drop_path_rate": _RATE,
    "initializer_range": _number(0),
    "layer_norm_eps": _number(0),
    "layerscale_value": _number(0),
    "no_object_weight": _number(0),
    "class_weight": _number(0),
    "mask_weight": _number(0),
    "dice_weight": _number(0),
    "oversample_ratio": _number(1),
    "importance_sample_ratio": _number(0, 1),
    "pos_embed_shift": _or_null(_POSITIVE),
    "pos_embed_jitter": _or_null(_POSITIVE),
    "pos_embed_rescale": _or_null(_POSITIVE),
    "rope_theta": _POSITIVE,
    "rope_parameters": Allowed(
        "an object with rope_type and rope_theta only",
        lambda x: isinstance(x, Mapping) and x.keys() <= {"rope_type", "rope_theta"},
    ),
    "rope_parameters.rope_type": Allowed(
        f'"{ROPE_TYPE}", the only one supported', lambda x: x == ROPE_TYPE
    ),
    "rope_parameters.rope_theta": _POSITIVE,
    "id2label": Allowed(
        f"a name for each class id from 0 on, of at most {_MAX_LABELS:,} classes", _are_labels
    ),
    "id2label.*": Allowed("a name, in valid Unicode", _is_text),
    "stuff_classes": _or_null(
        Allowed(
            "a list of class ids", lambda x: isinstance(x, list | tuple) and all(map(is_int, x))
        )
    ),
}


def check(values: Mapping[str, Any], within: str = "") -> None:
    """Checks values against the table; keys that it does not have are ignored.

    Raises:
        ValueError: a value is invalid; the message has its key, the value and what was expected.
    """
    for key, value in values.items():
        name = f"{within}{key}"
        allowed = ALLOWED.get(name) or ALLOWED.get(f"{within}*")
        if allowed and not allowed.works(value):
            raise refusal(name, value, allowed.expected)
        if name in ("id2label", "rope_parameters"):
            check(value, f"{name}.")


def refusal(key: str, value: object, expected: str) -> ValueError:
    return ValueError(f"{key} is {shortened(value)}; expected {expected}")
