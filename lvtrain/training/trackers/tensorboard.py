"""TensorBoard: `tensorboard --logdir runs/NAME/tensorboard`."""

from __future__ import annotations

from typing import Any

from lvtrain.training.trackers import TRACKERS, TrackedRun, Tracker, TrackerSection, numbers


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """`train/NAME` for every number in a row of metrics, `evaluation/BENCHMARK` for accuracies."""

    package = "tensorboard"

    def __init__(self, settings: TrackerSection, run: TrackedRun) -> None:
        super().__init__(settings, run)
        self._writer: Any = None

    def begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self.run.folder / "tensorboard"), flush_secs=30, purge_step=step + 1)

    def metrics(self, row: dict[str, Any]) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(f"train/{name}", value, row["step"])

    def event(self, row: dict[str, Any]) -> None:
        if row["event"] == "evaluation":
            for benchmark, figure in row["figures"].items():
                self._writer.add_scalar(f"evaluation/{benchmark}", figure, row["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
