"""Trackers: TensorBoard's own files read by its own reader, and a toy that is defined here, chosen by name, and raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.recipe.files import resolve
from lvtrain.recipe.trackers import TRACKERS, TrackerSection
from lvtrain.training.checks import check_trackers
from lvtrain.training.telemetry import Telemetry
from lvtrain.training.trackers import TrackedRun, Tracker
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.runs import TINY, events, metrics, recipe_file

ALONE = World(0, 1, 0, torch.device("cpu"))


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(row.step, row.value) for row in found.Scalars(tag)]


def test_tensorboard_has_every_number_and_no_step_twice(tmp_path: Path) -> None:
    run = TrackedRun(tmp_path, "run", {})
    for begin, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):  # stopped after step 4, resumed from step 2
        telemetry = Telemetry(run, ALONE, [TrackerSection(name="tensorboard")])
        telemetry.begin(begin)
        for step in steps:
            telemetry.metrics({"step": step, "phase": "one", "loss": step / 2 + begin, "cos2": None})
        telemetry.event("evaluation", step=steps[-1], figures={"lfw": 0.5 + begin / 10})
        telemetry.close()
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 1.0), (3, 3.5), (4, 4.0), (5, 4.5)]
    assert scalars(tmp_path, "evaluation/lfw") == [(5, pytest.approx(0.7))]
    assert sorted(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]) == [
        "evaluation/lfw",
        "train/loss",
    ]


def _train_with_a_toy(rank: int, size: int, recipe: str, folder: str) -> int:
    from lvtrain.main import main

    class ToySection(TrackerSection):
        raises_at: int

    @TRACKERS.register("toy")
    class Toy(Tracker):
        package, section = "json", ToySection

        def metrics(self, row: dict[str, Any]) -> None:
            if row["step"] == self.settings.raises_at:  # type: ignore[attr-defined]
                raise ConnectionError("the server is away")
            with (Path(folder) / "toy.jsonl").open("a") as file:
                file.write(json.dumps({"run": self.run.recipe["name"], "step": row["step"]}) + "\n")

    return main(["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / "zero2.json")])


def test_a_tracker_that_raises_is_reported_once_and_training_goes_on(tiny_faces: Path, tmp_path: Path) -> None:
    trackers = [{"name": "toy", "raises_at": 3}, "tensorboard"]
    recipe = recipe_file(tmp_path, tiny_faces / "train", logging={"trackers": trackers})
    assert run_ranks(2, _train_with_a_toy, str(recipe), str(tmp_path)) == [0, 0]
    folder = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert rows == [{"run": "tiny", "step": 1}, {"run": "tiny", "step": 2}]
    (off,) = events(folder, "tracker_off")
    assert off["tracker"] == "toy" and off["reason"] == "ConnectionError: the server is away"
    assert [row["step"] for row in metrics(folder)] == list(range(1, 13))
    assert [step for step, _ in scalars(folder, "train/loss")] == list(range(1, 13))


def test_a_tracker_whose_package_is_missing_is_refused() -> None:
    class Missing(Tracker):
        package = "not_installed_anywhere"

        def metrics(self, row: dict[str, Any]) -> None: ...

    TRACKERS.register("missing")(Missing)
    try:
        recipe = resolve(TINY | {"data": {"path": "x"}, "logging": {"trackers": ["missing"]}})
        with pytest.raises(UserError, match="not_installed_anywhere"):
            check_trackers(recipe)
    finally:
        TRACKERS.unregister("missing")


def test_an_unknown_tracker_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"logging\.trackers\.0.*'tensorboard'"):
        resolve(TINY | {"data": {"path": "x"}, "logging": {"trackers": ["tensorbord"]}})
