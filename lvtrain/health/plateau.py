"""Is a run that does not learn on a plateau that it will leave, or stuck?

At first all images of a large network become one direction. The loss then stays at that of equal cosines (s m + ln rC for
CosFace) until the network escapes: the published ViT-L on WebFace42M stayed at 38.8 to 39.3 until step 1,200. So nothing
is called stuck before the warm-up and one more epoch are over, nor while the loss falls.
"""

from __future__ import annotations

from typing import Any

from lvtrain.health.causes import Finding, finding
from lvtrain.recipe.sections import Recipe

_STEPS = 50  # before them a low cosine says nothing
_ROWS = 6  # log lines that show a trend
_FALL = 0.005  # of the loss, between the first and the last third of these lines: it still learns


class Plateau:
    """Follows cos2, batch_cosine and loss of the log lines.

    Args:
        recipe: of the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.warmup, self.dim = recipe.schedule.warmup, recipe.backbone.embedding_dim
        self.batch = recipe.phases[0].global_batch
        self.over_at: float | None = None  # the epoch in which the warm-up was over
        self.losses: list[float] = []  # since then

    def add(self, row: dict[str, Any], *, step: int, epoch: float) -> list[Finding]:
        """What a row of `metrics.jsonl` shows, after `step` steps and `epoch` epochs."""
        cos2, across, loss = row.get("cos2"), row.get("batch_cosine"), row.get("loss")
        if cos2 is None or across is None or loss is None:
            return []
        behind = {"steps": float(step), "epochs": epoch, "samples": float(step * self.batch)}[self.warmup.unit]
        if behind >= self.warmup.amount:
            self.over_at = epoch if self.over_at is None else self.over_at
            self.losses.append(loss)
        # measured on the quick start: cos2 is 0.12 after an epoch and batch_cosine 0.00; with 30 and 300 times its
        # learning rate they are 0.01 to 0.02, and 0.2 to 0.4
        alike, chance = across > 0.15 and cos2 < 0.1, cos2 < 2 / self.dim
        if step < _STEPS or not (alike or chance):
            return []
        values = {"across": across, "cos2": cos2}
        if self.over_at is None or epoch < self.over_at + 1 or len(self.losses) < _ROWS or self._falls():
            return [finding("plateau", is_warning=False, **values)] if alike else []
        return [finding("not learning", epoch=epoch, **values)]

    def _falls(self) -> bool:
        third = len(self.losses) // 3
        first, last = sum(self.losses[:third]) / third, sum(self.losses[-third:]) / third
        return last < first * (1 - _FALL)
