"""Taking models out: other trainers' files, ONNX, packages with a model card, and checks by the clients that open them."""
