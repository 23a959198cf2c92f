"""EoMT-DINOv3 in plain PyTorch: the network that converted checkpoints are checked against.

processor = EomtImageProcessor.from_pretrained("path/or/hub-repo")
model = EomtDinov3ForUniversalSegmentation.from_pretrained("path/or/hub-repo")
outputs = model(**processor(images=image))
processor.post_process_panoptic_segmentation(outputs, target_sizes=[image.size[::-1]])
"""

from reference_model.backbone import Dinov3Backbone
from reference_model.config import EomtDinov3Config
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
