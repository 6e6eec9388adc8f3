"""An exponential moving average of the evaluated module's weights and buffers, by timm, saved and evaluated like the weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from lvtrain.checkpoint.state import Replicated, State


class Average:
    """Build it before the engine partitions the module (ZeRO-3); call `update` where the weights are whole."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._ema = ModelEmaV3(module, decay=decay)

    @property
    def module(self) -> nn.Module:
        return self._ema.module

    def update(self, module: nn.Module) -> None:
        with torch.no_grad():
            self._ema.update(module)

    def state(self) -> State:
        return {f"ema.{name}": Replicated(tensor) for name, tensor in self.module.state_dict().items()}

    def load_state(self, reader: Any) -> None:
        self.module.load_state_dict({name: reader.replicated(f"ema.{name}") for name in self.module.state_dict()})
