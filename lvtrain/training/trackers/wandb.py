"""Weights & Biases. Without a network: `WANDB_MODE=offline`, or `{name: wandb, mode: offline}`; `wandb sync` sends it later."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar, Literal

from lvtrain.recipe.base import setting
from lvtrain.training.trackers import TRACKERS, TrackedRun, Tracker, TrackerSection, numbers


class WandbSection(TrackerSection):
    """Keys of the tracker `wandb`."""

    project: str = setting("lvtrain", "project that the run is shown in")
    entity: str | None = setting(None, "user or team; absent: your default")
    mode: Literal["online", "offline"] | None = setting(
        None, "whether data is sent at once; absent: WANDB_MODE, or online"
    )


@TRACKERS.register("wandb")
class Wandb(Tracker):
    """`train/NAME` for every number in a row of metrics, `evaluation/BENCHMARK`, and the resolved recipe as config.

    A resumed run continues the same W&B run, whose id is the run's.
    """

    package = "wandb"
    section: ClassVar[type[TrackerSection]] = WandbSection

    def __init__(self, settings: WandbSection, run: TrackedRun) -> None:
        super().__init__(settings, run)
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            name=run.recipe.get("name"),
            id=run.run_id,
            resume="allow",
            dir=str(run.folder),
            config=run.recipe,
        )
        self._run.define_metric("*", step_metric="step")

    def metrics(self, row: dict[str, Any]) -> None:
        self._run.log({"step": row["step"], **{f"train/{name}": value for name, value in numbers(row).items()}})

    def event(self, row: dict[str, Any]) -> None:
        if row["event"] == "evaluation":
            figures = {f"evaluation/{name}": value for name, value in row["figures"].items()}
            self._run.log({"step": row["step"], **figures})

    def close(self) -> None:
        import wandb

        try:
            self._run.finish()
        except Exception:
            # deepspeed ends W&B's own process at Ctrl-C; wandb would then print a traceback when Python exits
            with contextlib.suppress(Exception):
                wandb.teardown()
            raise
