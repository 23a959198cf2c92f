"""Converts TU/e's delta weights and a DINOv3 backbone to a checked model.

>>> import converter
>>> conversion = converter.convert("shapes_panoptic_128", "model")
>>> conversion.verdict.verdict
'passed'
>>> converter.verify("model").verdict
'passed'
"""

from converter.checks.outputs import verify_outputs
from converter.checks.recording import Recording, record
from converter.checks.verdict import Cause, FirstDifference, Level, Trial, Verdict
from converter.checks.verification import verify
from converter.conversion import Conversion, convert
from converter.deltas import Delta, make_delta
from converter.errors import (
    AccessError,
    EomtConvertError,
    HubUnavailableError,
    MismatchError,
    NotVerifiedError,
    OutputError,
    OutputsDifferError,
    PlanError,
    UnreadableFileError,
    UsageError,
)
from converter.exporting.export import Export, export
from converter.publishing.push import Publication, publish
from converter.publishing.release import Release, release
from converter.version import __version__

__all__ = [
    "AccessError",
    "Cause",
    "Conversion",
    "Delta",
    "EomtConvertError",
    "Export",
    "FirstDifference",
    "HubUnavailableError",
    "Level",
    "MismatchError",
    "NotVerifiedError",
    "OutputError",
    "OutputsDifferError",
    "PlanError",
    "Publication",
    "Recording",
    "Release",
    "Trial",
    "UnreadableFileError",
    "UsageError",
    "Verdict",
    "__version__",
    "convert",
    "export",
    "make_delta",
    "publish",
    "record",
    "release",
    "verify",
    "verify_outputs",
]
