"""The recipe's `optimizer` section: the keys that every optimizer of the backbone has.

Each optimizer adds its own, see `lvtrain.engine.optimizers`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from lvtrain.recipe.base import NamedSection, setting
from lvtrain.recipe.registry import Registry, named_section

OPTIMIZERS: Registry[Any] = Registry("optimizer", "lvtrain.engine.optimizers")

_LEARNED = "a change would make it another run"
_GROUPS = "it decides the optimizer's parameter groups"


class Optimizer(NamedSection):
    """Keys that every backbone optimizer has."""

    # with `lr_for_batch`, the rate for a batch k times as large is k to this power: 1 is the linear rule, 1/2 the square root
    batch_power: ClassVar[float] = 1.0

    name: str = setting("adamw", "name of the backbone's optimizer", because="the checkpoints hold its state")
    lr: float = setting(1e-3, "peak learning rate of the backbone", resume="reported", gt=0)
    lr_for_batch: int | None = setting(
        None,
        "global batch that lr is for; in a phase with another batch the rate follows the batch: in proportion for sgd, by "
        "the square root for adamw. Absent: lr for every batch",
        resume="reported",
        unit="images",
        gt=0,
    )
    weight_decay: float = setting(0.1, "weight decay", because=_LEARNED, ge=0)
    weight_decay_end: float | None = setting(
        None,
        "weight decay at the end of schedule.total; it gets there by a cosine, as in DINO; absent: constant",
        because=_LEARNED,
        ge=0,
    )
    decay_norms: bool = setting(
        False,
        "weight decay also on norms, biases and position embeddings, as in arcface_torch",
        because=_GROUPS,
    )
    layer_decay: float | None = setting(
        None,
        "layer-wise learning-rate decay: the rate of a block is that of the next block times this",
        because=_GROUPS,
        gt=0,
        le=1,
    )
    clip: float = setting(
        5.0, "largest gradient norm of the backbone; a larger gradient is scaled down", because=_LEARNED, gt=0
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "bfloat16", "arithmetic of the backbone; its weights are float32 in both", because=_LEARNED
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _short_names(cls, value: Any) -> Any:
        if value in ("fp16", "float16", "half"):
            raise ValueError("float16 needs loss scaling, which lvtrain does not have; use bfloat16")
        return {"bf16": "bfloat16", "fp32": "float32"}.get(value, value) if isinstance(value, str) else value

    def peak_for(self, global_batch: int) -> float:
        """Peak learning rate of a phase with this global batch."""
        if self.lr_for_batch is None:
            return self.lr
        return float(self.lr * (global_batch / self.lr_for_batch) ** self.batch_power)

    def weight_decay_at(self, progress: float) -> float:
        """Weight decay after the share `progress`, in [0, 1], of the schedule.

        A half cosine (Caron et al., ICCV 2021, implementation details).
        """
        first, last = self.weight_decay, self.weight_decay_end
        return first if last is None else last + (first - last) * (1.0 + math.cos(math.pi * progress)) / 2.0


if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    AnyOptimizer = named_section(OPTIMIZERS, default="adamw")
