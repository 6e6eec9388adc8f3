"""Trackers: TensorBoard's own files read by its own reader, and a toy that is defined here, chosen by name, and raises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
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


def track_two_starts(name: str, folder: Path, **settings: Any) -> None:
    """Steps 1 to 3, then a second start with steps 4 and 5, each ending with an evaluation."""
    tracker = TRACKERS.get(name)
    run = TrackedRun(folder, "a1b2c3d4e5f60718", {"name": "tiny", "optimizer": {"lr": 1e-3}})
    for steps in ((1, 2, 3), (4, 5)):
        opened = tracker(tracker.section(name=name, **settings), run)
        opened.begin(steps[0] - 1)
        for step in steps:
            opened.metrics({"step": step, "phase": "one", "loss": step / 2, "cos2": None})
        opened.event({"event": "evaluation", "step": steps[-1], "figures": {"lfw": steps[-1] / 10}})
        opened.close()


def leveldb_records(data: bytes, first: int) -> Iterator[bytes]:
    """Records of a LevelDB log, which a `.wandb` file is after its header of `first` bytes (blocks of 32 KiB)."""
    at, whole = 0, b""
    while at + 7 <= len(data):
        if (left := 32768 - (at + first) % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb_offline_holds_the_rows_and_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    track_two_starts("wandb", tmp_path, mode="offline")
    rows: list[dict[str, Any]] = []
    ids, config = set(), {}
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()[7:], first=7):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = record.history.item
                rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
            elif kind == "run":
                ids.add(record.run.run_id)
                config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (s, s / 2) for s in range(1, 6)
    ]
    assert [(row["step"], row["evaluation/lfw"]) for row in rows if "evaluation/lfw" in row] == [(3, 0.3), (5, 0.5)]
    assert ids == {"a1b2c3d4e5f60718"} and config["optimizer"] == {"lr": 1e-3}


WITHOUT_SERVICE = """
import sys
from pathlib import Path

import psutil
import torch

from lvtrain.distributed.world import World
from lvtrain.training.telemetry import Telemetry
from lvtrain.training.trackers import TRACKERS, TrackedRun

section = TRACKERS.get("wandb").section(name="wandb", mode="offline")
run = TrackedRun(Path(sys.argv[1]), "a1b2c3d4e5f60718", {"name": "tiny"})
telemetry = Telemetry(run, World(0, 1, 0, torch.device("cpu")), [section])
telemetry.begin(0)
telemetry.metrics({"step": 1, "loss": 1.0})
for child in psutil.Process().children(recursive=True):
    child.terminate()
    child.wait(30)
telemetry.close()
"""


def test_wandb_whose_own_process_is_gone_is_reported_and_leaves_no_traceback(tmp_path: Path) -> None:
    """As at Ctrl-C under deepspeed, whose launcher ends the processes of its ranks' children, too."""
    pytest.importorskip("wandb")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SERVICE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    # whether W&B notices depends on how far its process had come
    if (tmp_path / "events.jsonl").exists():
        assert [row["tracker"] for row in events(tmp_path, "tracker_off")] == ["wandb"]


def test_mlflow_holds_the_rows_of_both_starts_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder: the package's server needs a database
    uri = f"file:{tmp_path}/store"
    track_two_starts("mlflow", tmp_path, uri=uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("lvtrain")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(step, step / 2) for step in range(1, 6)]
    assert run.data.metrics["evaluation/lfw"] == 0.5


def test_trackio_holds_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio", reason="trackio needs an older Pillow than lvtrain's pinned one")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    track_two_starts("trackio", tmp_path)
    (run,) = trackio.Api().runs("lvtrain")
    assert run.name == "tiny-a1b2c3d4"
