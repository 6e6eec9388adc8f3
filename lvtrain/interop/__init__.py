"""Other people's formats, in and out. See README.md."""

from lvtrain.interop.models import Model, load_model

__all__ = ["Model", "load_model"]
