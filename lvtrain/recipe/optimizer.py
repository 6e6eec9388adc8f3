"""The recipe's `optimizer` section: what every optimizer of the backbone has. Each optimizer adds its own fields, see
`lvtrain.engine.optimizers`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lvtrain.recipe.base import NamedSection, setting
from lvtrain.recipe.registry import Registry, named_section

OPTIMIZERS: Registry[Any] = Registry("optimizer", "lvtrain.engine.optimizers")

_LEARNED = "the run has learned with it so far"
_GROUPS = "it decides the optimizer's parameter groups"


class Optimizer(NamedSection):
    # the factor on `lr` for a batch k times as large is k to this power
    batch_power: ClassVar[float] = 1.0

    name: str = setting("adamw", "name of the backbone's optimizer", because="the checkpoints hold its state")
    lr: float = setting(1e-3, "peak learning rate of the backbone", resume="reported", gt=0, allow_inf_nan=False)
    weight_decay: float = setting(0.1, "weight decay", because=_LEARNED, ge=0, allow_inf_nan=False)
    weight_decay_end: float | None = setting(
        None,
        "weight decay at the end of schedule.total, reached by a cosine, as in DINO; absent: constant",
        because=_LEARNED,
        ge=0,
        allow_inf_nan=False,
    )
    decay_norms: bool = setting(
        False,
        "weight decay on norms, biases and position embeddings too, as arcface_torch does",
        because=_GROUPS,
    )
    layer_decay: float | None = setting(
        None,
        "layer-wise learning-rate decay: the factor from a block to the one before it",
        because=_GROUPS,
        gt=0,
        le=1,
    )
    clip: float = setting(5.0, "largest gradient norm of the backbone", because=_LEARNED, gt=0, allow_inf_nan=False)
    precision: Literal["float32", "bfloat16"] = setting(
        "bfloat16", "arithmetic of the backbone; its weights are float32 in both", because=_LEARNED
    )
    gradient_communication: Literal["float32", "bfloat16"] = setting(
        "float32", "type in which gradients are summed over GPUs", because=_LEARNED
    )

    def weight_decay_at(self, progress: float) -> float:
        """Weight decay where a share `progress` in [0, 1] of the schedule is behind: a half cosine (Caron et al., ICCV
        2021, implementation details)."""
        first, last = self.weight_decay, self.weight_decay_end
        return first if last is None else last + (first - last) * (1.0 + math.cos(math.pi * progress)) / 2.0


if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    AnyOptimizer = named_section(OPTIMIZERS, default="adamw")
