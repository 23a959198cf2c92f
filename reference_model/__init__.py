"""EoMT-DINOv3 in plain PyTorch: the network that converted checkpoints are checked against.

model = EomtDinov3ForUniversalSegmentation.from_pretrained("path/or/hub-repo")
output = model(pixel_values)  # (batch, 3, height, width), rescaled and normalised
"""

from reference_model.backbone import Dinov3Backbone
from reference_model.config import EomtDinov3Config
from reference_model.model import (
    EomtDinov3ForUniversalSegmentation,
    EomtDinov3ForUniversalSegmentationOutput,
    Prediction,
)
from reference_model.pretrained import EomtDinov3PreTrainedModel

__all__ = [
    "Dinov3Backbone",
    "EomtDinov3Config",
    "EomtDinov3ForUniversalSegmentation",
    "EomtDinov3ForUniversalSegmentationOutput",
    "EomtDinov3PreTrainedModel",
    "Prediction",
]
