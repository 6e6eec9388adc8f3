"""trackio: a local dashboard (`trackio show`); its data stay on this machine unless you give a space."""

from __future__ import annotations

from typing import Any, ClassVar

from lvtrain.recipe.base import setting
from lvtrain.training.trackers import TRACKERS, TrackedRun, Tracker, TrackerSection, numbers


class TrackioSection(TrackerSection):
    """Keys of the tracker `trackio`."""

    project: str = setting("lvtrain", "project that the run is shown in")
    space: str | None = setting(None, "Hugging Face space that data is sent to; absent: none is sent")


@TRACKERS.register("trackio")
class Trackio(Tracker):
    """`train/NAME` for every number in a row of metrics, `evaluation/BENCHMARK`, and the resolved recipe as config."""

    package = "trackio"
    section: ClassVar[type[TrackerSection]] = TrackioSection

    def __init__(self, settings: TrackioSection, run: TrackedRun) -> None:
        super().__init__(settings, run)
        import trackio

        name = f"{run.recipe.get('name')}-{run.run_id[:8]}"
        self._run = trackio.init(
            settings.project, name=name, space_id=settings.space, config=run.recipe, resume="allow", embed=False
        )

    def metrics(self, row: dict[str, Any]) -> None:
        self._run.log({f"train/{name}": value for name, value in numbers(row).items()}, step=row["step"])

    def event(self, row: dict[str, Any]) -> None:
        if row["event"] == "evaluation":
            figures = {f"evaluation/{name}": value for name, value in row["figures"].items()}
            self._run.log(figures, step=row["step"])

    def close(self) -> None:
        self._run.finish()
