"""What is trained: one file a method. The registry `METHODS` finds the files by themselves."""

from lvtrain.methods.base import LossOutput, Method, MethodSection, StepInfo, create_method, method_title
from lvtrain.recipe.registry import METHODS

__all__ = ["METHODS", "LossOutput", "Method", "MethodSection", "StepInfo", "create_method", "method_title"]
