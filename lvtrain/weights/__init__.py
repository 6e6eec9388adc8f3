"""Weights from anywhere: files and folders in, named tensors and networks out."""

from lvtrain.weights.models import Model, load_model

__all__ = ["Model", "load_model"]
