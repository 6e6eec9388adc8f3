"""MLflow: a tracking server, or a local folder."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from lvtrain.recipe.base import setting
from lvtrain.training.trackers import TRACKERS, TrackedRun, Tracker, TrackerSection, numbers


class MlflowSection(TrackerSection):
    """Keys of the tracker `mlflow`."""

    uri: str | None = setting(None, "tracking server, or a file: folder; absent: MLFLOW_TRACKING_URI")
    experiment: str = setting("lvtrain", "experiment that the run belongs to")


@TRACKERS.register("mlflow")
class Mlflow(Tracker):
    """`train/NAME` for every number in a row of metrics, `evaluation/BENCHMARK`, and the resolved recipe as `recipe.json`.

    A resumed run continues the same MLflow run, found by its tag `lvtrain.run_id`.
    """

    package = "mlflow"
    section: ClassVar[type[TrackerSection]] = MlflowSection

    def __init__(self, settings: MlflowSection, run: TrackedRun) -> None:
        super().__init__(settings, run)
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(settings.uri)
        experiment = self._client.get_experiment_by_name(settings.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(settings.experiment)
        found = self._client.search_runs([number], f"tags.`lvtrain.run_id` = '{run.run_id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
        else:
            name = str(run.recipe.get("name"))
            self._id = self._client.create_run(number, tags={"lvtrain.run_id": run.run_id}, run_name=name).info.run_id
            self._client.log_text(self._id, json.dumps(run.recipe, indent=1), "recipe.json")

    def metrics(self, row: dict[str, Any]) -> None:
        self._log({f"train/{name}": value for name, value in numbers(row).items()}, row["step"])

    def event(self, row: dict[str, Any]) -> None:
        if row["event"] == "evaluation":
            self._log({f"evaluation/{name}": value for name, value in row["figures"].items()}, row["step"])

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)
