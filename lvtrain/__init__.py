"""lvtrain: the open trainer for face-recognition vision transformers."""

__version__ = "0.2.0"
