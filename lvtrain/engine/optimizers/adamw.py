"""AdamW (Loshchilov and Hutter, ICLR 2019): torch's fused kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lvtrain.engine.optimizers import OPTIMIZERS, BackboneOptimizer
from lvtrain.recipe.base import setting
from lvtrain.recipe.optimizer import Optimizer

if TYPE_CHECKING:
    import torch


Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamWSection(Optimizer):
    """Keys of `optimizer: adamw` (Loshchilov and Hutter, ICLR 2019)."""

    # Malladi et al., NeurIPS 2022: the square root rule for adaptive optimizers
    batch_power: ClassVar[float] = 0.5

    name: Literal["adamw"] = setting("adamw", "AdamW", because="the checkpoints hold its state")
    betas: tuple[Decay, Decay] = setting((0.9, 0.999), "decay of the two moments", because="the moments depend on it")
    eps: float = setting(
        1e-8, "added to the root of the second moment", because="a change would make it another run", gt=0
    )


@OPTIMIZERS.register("adamw")
class AdamW(BackboneOptimizer):
    """torch's fused AdamW."""

    section = AdamWSection
    step_name = "adam_step"

    @staticmethod
    def state_names(section: AdamWSection) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    @staticmethod
    def create(groups: list[dict[str, Any]], section: AdamWSection) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(groups, lr=0.0, betas=section.betas, eps=section.eps, fused=True)
