"""lvtrain: the open trainer for face-recognition vision transformers."""

__version__ = "0.1.0"
