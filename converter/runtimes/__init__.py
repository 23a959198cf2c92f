"""Runs exported files: ONNX with onnxruntime, programs of torch.export with torch."""
