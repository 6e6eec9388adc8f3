"""Weights from anywhere: files and folders in, named tensors and networks out."""
