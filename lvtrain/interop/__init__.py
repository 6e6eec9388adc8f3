"""Other people's formats, in and out. See README.md."""

from lvtrain.weights.models import Model, load_model

__all__ = ["Model", "load_model"]
