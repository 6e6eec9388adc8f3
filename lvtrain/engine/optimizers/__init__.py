"""Optimizers of the backbone, one file each.

To add one: a recipe section with its own fields, and a `BackboneOptimizer` under `@OPTIMIZERS.register("NAME")`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from lvtrain.recipe.optimizer import OPTIMIZERS, Optimizer

if TYPE_CHECKING:
    import torch

__all__ = ["OPTIMIZERS", "BackboneOptimizer"]


class BackboneOptimizer(ABC):
    """How an optimizer is made, and which state it keeps. The engine shards, saves and loads that state by name."""

    section: ClassVar[type[Optimizer]]
    # name of the step count in a checkpoint, for an optimizer whose state has a `step`
    step_name: ClassVar[str | None] = None

    @staticmethod
    @abstractmethod
    def state_names(section: Any) -> tuple[str, ...]:
        """The keys of its state that have the shape of the weight, float32; the planner counts them, too.

        They are zero at the start. An optimizer must give the same step from zeros as from no state at all.
        """

    @staticmethod
    @abstractmethod
    def create(groups: list[dict[str, Any]], section: Any) -> torch.optim.Optimizer:
        """The optimizer over `groups`, each with its `params` and `weight_decay`; the engine sets `lr` every step.

        Its `step` must honour `grad_scale` (gradients are divided by it) and `found_inf` (nothing changes where it is
        1), two tensors that the engine sets, as torch's fused optimizers do.
        """
