"""Runs exported files: ONNX with onnxruntime, programs of torch.export with torch."""

import os

# Before onnxruntime is imported: since version 1.32 it sends usage data to Microsoft, and writes an
# identifier to the folder for temporary files, unless this is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
