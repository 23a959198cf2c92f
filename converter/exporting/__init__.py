"""The model written as a file that other runtimes run: ONNX, or a program of torch.export."""
