"""Through the front door: stopped, killed and resumed runs against undisturbed ones. Same ranks: the same bits. Other ranks: the same losses.

Ranks are forked from a process that has imported everything (`tools/trial.py`), so that a start costs seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvtrain import faults
from lvtrain.checkpoint.lease import hold
from lvtrain.data import SampleOrder, ShardDataset
from lvtrain.distributed.world import World
from lvtrain.main import main
from lvtrain.training import outcome
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.runs import events, free_port, metrics, recipe_file
from tools.trial import contents, end, rows, start

TOTAL = 18  # phases of 4 and 4 steps and the rest; an epoch ends at 15
Peaceful = Callable[[int, int], Path]


def go(recipe: Path, size: int, zero: int, fault: str = "", *more: str) -> list[int | None]:
    arguments = ["--recipe", str(recipe), "--ds_config", f"ds_configs/zero{zero}.json", *more]
    codes = end(start(size, arguments, recipe.parent / "log.txt", {"LVTRAIN_FAULT": fault}), 500.0)
    return codes


def said(recipe: Path) -> str:
    return (recipe.parent / "log.txt").read_text()


def make(folder: Path, faces: Path, **changes: Any) -> Path:
    longer = {"schedule": {"total": f"{TOTAL} steps"}, "ema": {"decay": 0.9}}
    return recipe_file(folder, faces / "train", **(longer | changes))


def counted(recipe: Path) -> dict[int, dict[str, Any]]:
    """The last count of each epoch."""
    return {row["epoch"]: row for row in events(folder_of(recipe), "epoch")}


def folder_of(recipe: Path) -> Path:
    return recipe.parent / "runs" / "tiny"


@pytest.fixture(scope="module")
def peaceful(tiny_faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Peaceful:
    """The recipe of an undisturbed run, by ranks and ZeRO stage; each is made once."""

    @cache
    def recipe_of(size: int, zero: int) -> Path:
        recipe = make(tmp_path_factory.mktemp(f"peaceful_{size}_{zero}_"), tiny_faces)
        assert go(recipe, size, zero) == [0] * size, said(recipe)[-2000:]
        return recipe

    return recipe_of


def differing(left: Path, right: Path) -> list[str]:
    ours, theirs = contents(folder_of(left)), contents(folder_of(right))
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def disturb(recipe: Path, zero: int, blows: list[str]) -> None:
    """Starts the run again and again, each time with the next fault, then to its end."""
    for fault in blows:
        codes = go(recipe, 2, zero, fault)
        wanted = 75 if fault.endswith("sigterm") else -9
        assert wanted in codes, f"{fault}: {codes}\n{said(recipe)[-2000:]}"
    assert go(recipe, 2, zero) == [0, 0], said(recipe)[-2000:]


@pytest.mark.parametrize(
    ("zero", "blows"),
    [
        pytest.param(1, ["loop.step:0:5:sigterm", "loop.step:1:16:sigkill"], marks=pytest.mark.slow),
        (2, ["save.mid_file:1:6:sigterm", "loop.step:1:16:sigkill"]),
        (3, ["loop.step:0:5:sigkill", "load.begin:1:*:sigterm", "loop.step:1:16:sigkill"]),
    ],
)
def test_resume_is_bitwise(tiny_faces: Path, tmp_path: Path, peaceful: Peaceful, zero: int, blows: list[str]) -> None:
    """Asked to stop in the second phase (in a step, a save, a load), and killed just after the epoch's end.

    Weights, moments, rows, banks, EMA, BatchNorm and metrics have the same bits.
    """
    disturbed = make(tmp_path, tiny_faces)
    disturb(disturbed, zero, blows)
    names = contents(folder_of(peaceful(2, zero)))
    assert {"classifier.weight", "classifier.expectation", "backbone.adam_step"} <= names.keys()
    assert any(name.startswith("ema.") for name in names) and any("running_var" in name for name in names)
    assert f"metrics of step {TOTAL}" in names
    assert not differing(peaceful(2, zero), disturbed)
    assert [row["step"] for row in events(folder_of(disturbed), "resume")][-1] in (12, 15)
    for recipe in (peaceful(2, zero), disturbed):
        first, second = counted(recipe)[1], counted(recipe)[2]
        assert first["exact"] and first["distinct"] == first["served"] == first["images"] == 240
        assert not second["complete"] and second["exact"] is None and second["served"] == TOTAL * 16 - 240


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_resume_from_every_step_is_bitwise(tiny_faces: Path, tmp_path: Path, peaceful: Peaceful, zero: int) -> None:
    disturbed = make(tmp_path, tiny_faces)
    # asked to stop in step k, ranks agree one step later, so every second step
    disturb(disturbed, zero, [f"loop.step:1:{step}:sigterm" for step in range(0, TOTAL - 2, 2)])
    assert not differing(peaceful(2, zero), disturbed)


def test_resume_on_other_ranks_and_another_stage_trains_alike(
    tiny_faces: Path, tmp_path: Path, peaceful: Peaceful
) -> None:
    """2 ranks ZeRO-2 -> 1 rank ZeRO-1 -> 4 ranks ZeRO-3 -> 2 ranks ZeRO-2, through phase changes, without a conversion step."""
    wandering = make(tmp_path, tiny_faces)
    for size, zero, step in ((2, 2, 2), (1, 1, 6), (4, 3, 10)):
        assert go(wandering, size, zero, f"loop.step:0:{step}:sigterm") == [75] * size, said(wandering)[-2000:]
    assert go(wandering, 2, 2) == [0, 0], said(wandering)[-2000:]
    ours, theirs = metrics(folder_of(wandering)), metrics(folder_of(peaceful(2, 2)))
    assert [row["samples_seen"] for row in ours] == [row["samples_seen"] for row in theirs]
    first, second = counted(wandering)[1], counted(wandering)[2]
    assert first["exact"] and first["distinct"] == 240 and second["served"] == TOTAL * 16 - 240
    changed = events(folder_of(wandering), "resume")[0][
        "step"
    ]  # the first step on another number of ranks starts from the same bits
    for row, reference in zip(ours, theirs):
        tolerance = 1e-6 if row["step"] == changed + 1 else 2e-5
        assert row["loss"] == pytest.approx(reference["loss"], rel=tolerance), row["step"]


def test_damage_falls_back_and_ends_with_the_same_bits(tiny_faces: Path, tmp_path: Path, peaceful: Peaceful) -> None:
    disturbed = make(tmp_path, tiny_faces)
    # asked to stop in a phase's last step: the next phase is not even built
    assert go(disturbed, 1, 2, "loop.step:0:3:sigterm") == [75], said(disturbed)[-2000:]
    assert (
        events(folder_of(disturbed), "stop")[-1]["step"] == 4 and len(events(folder_of(disturbed), "phase_start")) == 1
    )
    assert go(disturbed, 1, 2, "loop.step:0:14:sigkill") == [-9]
    newest = max((folder_of(disturbed) / "checkpoints").glob("step_*"))
    data = bytearray((newest / "rank_00000.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "rank_00000.safetensors").write_bytes(data)
    assert go(disturbed, 1, 2) == [0], said(disturbed)[-2000:]
    assert (newest.parent / f"damaged_{newest.name}").is_dir()
    assert not differing(peaceful(1, 2), disturbed)
    # with nothing valid left there is an error, and no fresh start
    for folder in (folder_of(disturbed) / "checkpoints").glob("step_*"):
        (folder / "manifest.json").write_text("{}")
    last = len(metrics(folder_of(disturbed)))
    assert go(disturbed, 1, 2) == [2]
    ended = outcome.read(folder_of(disturbed))
    assert ended is not None and ended.outcome == "fatal"
    assert not list((folder_of(disturbed) / "checkpoints").glob("step_*"))
    assert len(metrics(folder_of(disturbed))) == last


def test_outputs_that_are_not_finite(tiny_faces: Path, tmp_path: Path, peaceful: Peaceful) -> None:
    """Once: skipped on all ranks. Three times in a row: the run stops, and resumes from a checkpoint before them."""
    once, thrice = (make(tmp_path / name, tiny_faces) for name in "ab")
    assert go(once, 2, 2, "loop.outputs:1:6:nan") == [0, 0], said(once)[-2000:]
    (event,) = events(folder_of(once), "nonfinite")
    (noted,) = (json.loads(line) for line in (folder_of(once) / "nonfinite.jsonl").read_text().splitlines())
    assert event["step"] == noted["step"] == 6 and event["named_in"] == "nonfinite.jsonl"
    # the second rank's half of the batch: the samples that the order puts there, with their labels and their places in the shards
    data = ShardDataset(tiny_faces / "train")
    ids = SampleOrder(len(data), 5, 8).at(range(6 * 16, 7 * 16))
    assert noted["samples_in_batch"] == 16 and noted["samples_not_finite"] == event["samples_not_finite"] == 8
    named = {sample["sample_id"]: (sample["label"], sample["shard"], sample["key"]) for sample in noted["samples"]}
    assert named == {int(i): (int(data.labels(np.array([i]))[0]), *data.describe(int(i))) for i in ids}
    assert {sample["sample_id"] for sample in noted["samples"] if sample["cosine"] == "nan"} == set(ids[8:].tolist())
    assert noted["micro_batch_losses"] == ["nan"] * 4, "of both ranks' samples each"
    assert noted["loss"] == noted["grad_norm"] == "nan"
    assert [row["step"] for row in metrics(folder_of(once)) if row["loss"] is None] == [7]  # no loss rather than 0
    assert counted(once)[1]["exact"] and counted(once)[1]["nonfinite"] == 16
    assert go(thrice, 2, 2, ";".join(f"loop.outputs:0:{step}:nan" for step in (10, 11, 12))) == [2, 2]
    ended = outcome.read(folder_of(thrice))
    assert ended is not None and (ended.outcome, ended.step) == ("fatal", 10)
    assert [row["in_row"] for row in events(folder_of(thrice), "nonfinite")] == [1, 2, 3]
    assert go(thrice, 2, 2) == [0, 0], said(thrice)[-2000:]
    assert [row["step"] for row in events(folder_of(thrice), "resume")] == [10]
    assert not [name for name in differing(peaceful(2, 2), thrice) if not name.startswith("metrics")]
    assert counted(thrice)[1]["exact"] and counted(thrice)[1]["nonfinite"] == 0, (
        "the steps that were undone do not count"
    )


def test_outputs_that_are_not_finite_right_after_a_phase_change(tiny_faces: Path, tmp_path: Path) -> None:
    """The checkpoint from before them is that of the phase's end, which is there already."""
    recipe = make(tmp_path, tiny_faces)
    assert go(recipe, 1, 2, ";".join(f"loop.outputs:0:{step}:nan" for step in (4, 5, 6))) == [2], said(recipe)[-2000:]
    ended = outcome.read(folder_of(recipe))
    assert ended is not None and (ended.outcome, ended.step) == ("fatal", 4)


def _blinded(rank: int, size: int, arguments: list[str], stop_after: int | None) -> int:
    """A rank whose outputs are not finite in three steps from step 10, but not when it comes there again."""
    last, came_back = 0, False

    def point(name: str, *, rank: int, step: int) -> str | None:
        nonlocal last, came_back
        if name == "loop.step":
            last, came_back = step, came_back or step < last
            if step == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
        return "nan" if name == "loop.outputs" and rank == 0 and step in (10, 11, 12) and not came_back else None

    faults.point = point
    return main(arguments)


def test_a_roll_back_skips_a_stretch_of_data(tiny_faces: Path, tmp_path: Path) -> None:
    """From the last checkpoint, past the data that was read since; stopped and resumed after it too; and not for ever."""
    through, stopped, hopeless = (make(tmp_path / name, tiny_faces, safety={"rollback": True}) for name in "abc")
    for recipe, stop_after, code in ((through, None, 0), (stopped, 13, 75)):
        arguments = ["--recipe", str(recipe), "--ds_config", "ds_configs/zero2.json"]
        assert run_ranks(2, _blinded, arguments, stop_after) == [code, code]
        (back,) = events(folder_of(recipe), "rollback")
        assert (back["to_step"], back["data_skip"]) == (9, 4 * 16)
    assert go(stopped, 2, 2) == [0, 0], said(stopped)[-2000:]
    assert [row["step"] for row in metrics(folder_of(through))] == list(range(1, TOTAL + 1))
    assert not differing(through, stopped)
    for recipe in (through, stopped):
        first, second = counted(recipe)[1], counted(recipe)[2]
        assert first["exact"] and (first["served"], first["skipped"]) == (240 - 4 * 16, 4 * 16)
        assert second["served"] == (TOTAL + 4) * 16 - 240
    assert go(hopeless, 2, 2, ";".join(f"loop.outputs:0:{step}:nan" for step in (10, 11, 12))) == [2, 2]
    assert [row["to_step"] for row in events(folder_of(hopeless), "rollback")] == [9, 9, 9]


def test_a_second_job_is_fenced_off_before_it_touches_anything(tiny_faces: Path, tmp_path: Path) -> None:
    """Of a run that stopped because its time was over."""
    recipe = make(tmp_path, tiny_faces)
    assert go(recipe, 1, 2, "", "--max-time", "0.001") == [75], said(recipe)[-2000:]
    ended = outcome.read(folder_of(recipe))
    assert ended is not None and (ended.outcome, ended.exit_code) == ("requeue", 75)
    watched = ("recipe.yaml", "run.json", "outcome.json", "events.jsonl", "environment.json")
    before = {name: (folder_of(recipe) / name).read_bytes() for name in watched}
    with hold(folder_of(recipe), World(0, 1, 0, torch.device("cpu"))):
        assert go(recipe, 1, 2) == [2]
    assert {name: (folder_of(recipe) / name).read_bytes() for name in watched} == before
    assert go(recipe, 1, 2) == [0], said(recipe)[-2000:]


def test_stopped_and_resumed_through_deepspeeds_launcher(tiny_faces: Path, tmp_path: Path, peaceful: Peaceful) -> None:
    """Ctrl-C, then SIGTERM to `deepspeed` and all it started: each time saved at one step, and ended with the bits of an undisturbed run."""
    disturbed = make(tmp_path, tiny_faces)

    def launch(step: int, number: signal.Signals) -> None:
        """Runs the launcher; the ranks wait at `step` until they are asked to stop, by this signal."""
        log = tmp_path / f"launcher_{step}.txt"
        command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "lvtrain/main.py"]
        command += ["--recipe", str(disturbed), "--ds_config", "ds_configs/zero2.json"]
        settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LVTRAIN_FAULT": f"loop.step:*:{step}:asked"}
        with log.open("w") as file:
            # a new session, so that a signal reaches exactly the launcher and its children
            job = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | settings, stdout=file, stderr=file, start_new_session=True
            )
        try:
            wait_for(lambda: len(rows(folder_of(disturbed))) >= step or job.poll() is not None, log)
            assert job.poll() is None, log.read_text()[-2000:]
            os.killpg(job.pid, number)
            job.wait(300)
            wait_for(lambda: over(job.pid), log)  # the launcher's front end ends before the ranks it started
        finally:
            if not over(job.pid):
                os.killpg(job.pid, signal.SIGKILL)

    launch(5, signal.SIGINT)
    launch(10, signal.SIGTERM)
    assert [row["reason"].split(",")[0] for row in events(folder_of(disturbed), "stop")] == ["SIGINT", "SIGTERM"]
    assert go(disturbed, 2, 2) == [0, 0], said(disturbed)[-2000:]
    assert not differing(peaceful(2, 2), disturbed)


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 300.0) -> None:
    end_of_patience = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_of_patience, log.read_text()[-3000:]
        time.sleep(0.1)


def over(group: int) -> bool:
    """Is every process of the group gone?"""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False
