"""ONNX recognisers: which file a pack means and how it runs, how it takes its images, and which of our networks it is."""
