"""What is trained: one file per method. The registry `METHODS` finds the files by itself."""

from lvtrain.methods.base import LossOutput, Method, MethodSection, StepInfo, create_method, method_title
from lvtrain.recipe.registry import METHODS

__all__ = ["METHODS", "LossOutput", "Method", "MethodSection", "StepInfo", "create_method", "method_title"]
