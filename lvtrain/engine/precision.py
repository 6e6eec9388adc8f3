"""A module's forward at the recipe's precision, outside the DeepSpeed engine (evaluation, averaged weights, class means)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def at_precision(module: nn.Module, precision: str, device: torch.device) -> Callable[..., Any]:
    """`module` as a function under autocast.

    Args:
        module: the network.
        precision: the recipe's `optimizer.precision`, "float32" or "bfloat16".
        device: where the module and its inputs are.

    Returns:
        A function of the module's inputs. A tensor that it returns is float32.
    """

    def forward(*inputs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = module(*inputs)
        return outputs.float() if isinstance(outputs, torch.Tensor) else outputs

    return forward
