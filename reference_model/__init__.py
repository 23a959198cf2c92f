"""EoMT-DINOv3 in plain PyTorch: the network that converted checkpoints are checked against.

processor = EomtImageProcessor.from_pretrained("path/or/hub-repo")
model = EomtDinov3ForUniversalSegmentation.from_pretrained("path/or/hub-repo")
outputs = model(**processor(images=image))
processor.post_process_panoptic_segmentation(outputs, target_sizes=[image.size[::-1]])
"""

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


def __getattr__(name: str) -> Any:
    """Imports the modules that need torch, which a config does not, when a name is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reference_model import backbone, image_processing, model, outputs, pretrained

    modules = (backbone, image_processing, model, outputs, pretrained)
    globals()[name] = found = next(getattr(m, name) for m in modules if hasattr(m, name))
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
