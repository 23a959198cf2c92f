"""EoMT-DINOv3 in plain PyTorch: the network that converted checkpoints are checked against.

processor = EomtImageProcessor.from_pretrained("path/or/hub-repo")
model = EomtDinov3ForUniversalSegmentation.from_pretrained("path/or/hub-repo")
outputs = model(**processor(images=image))
processor.post_process_panoptic_segmentation(outputs, target_sizes=[image.size[::-1]])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reference_model.config import EomtDinov3Config

if TYPE_CHECKING:
    from reference_model.backbone import Dinov3Backbone
    from reference_model.image_processing import BatchFeature, EomtImageProcessor
    from reference_model.model import EomtDinov3ForUniversalSegmentation
    from reference_model.outputs import EomtDinov3ForUniversalSegmentationOutput, Prediction
    from reference_model.pretrained import EomtDinov3PreTrainedModel

__all__ = [
    "BatchFeature",
    "Dinov3Backbone",
    "EomtDinov3Config",
    "EomtDinov3ForUniversalSegmentation",
    "EomtDinov3ForUniversalSegmentationOutput",
    "EomtDinov3PreTrainedModel",
    "EomtImageProcessor",
    "Prediction",
]

# the modules that import torch, which a config does not need
_MODULES = {
    "BatchFeature": "image_processing",
    "Dinov3Backbone": "backbone",
    "EomtDinov3ForUniversalSegmentation": "model",
    "EomtDinov3ForUniversalSegmentationOutput": "outputs",
    "EomtDinov3PreTrainedModel": "pretrained",
    "EomtImageProcessor": "image_processing",
    "Prediction": "outputs",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
