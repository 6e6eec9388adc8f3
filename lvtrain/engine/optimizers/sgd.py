"""SGD with momentum, as arcface_torch trains IResNet: torch's fused kernel. Weight decay is added to the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from lvtrain.engine.optimizers import OPTIMIZERS, BackboneOptimizer
from lvtrain.recipe.base import setting
from lvtrain.recipe.optimizer import Optimizer

if TYPE_CHECKING:
    import torch


class SgdSection(Optimizer):
    """Keys of `optimizer: sgd`."""

    # Goyal et al., 2017 (arXiv 1706.02677): the linear rule
    batch_power: ClassVar[float] = 1.0

    name: Literal["sgd"] = setting("sgd", "SGD", because="the checkpoints hold its state")
    lr: float = setting(0.1, "peak learning rate of the backbone", resume="reported", gt=0)
    weight_decay: float = setting(
        5e-4, "L2 weight decay, added to the gradient", because="a change would make it another run", ge=0
    )
    momentum: float = setting(0.9, "decay of the momentum", because="the momentum depends on it", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov's momentum", because="a change would make it another run")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SgdSection:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


@OPTIMIZERS.register("sgd")
class Sgd(BackboneOptimizer):
    """torch's fused SGD with momentum."""

    section = SgdSection

    @staticmethod
    def state_names(section: SgdSection) -> tuple[str, ...]:
        return ("momentum_buffer",) if section.momentum else ()

    @staticmethod
    def create(groups: list[dict[str, Any]], section: SgdSection) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups, lr=0.0, momentum=section.momentum, nesterov=section.nesterov, fused=True)
