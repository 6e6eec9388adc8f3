"""Through the front door: stopped, killed and resumed runs against undisturbed ones. Same ranks: the same bits. Other ranks: the same losses.

Ranks are forked from a process that has imported everything (`tools/torture.py`), so that a start costs seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lvtrain.training.lease import hold
from lvtrain.world import World
from tests.conftest import ROOT
from tests.runs import events, free_port, metrics, recipe_file
from tools.torture import contents, end, rows, start

TOTAL = 18  # phases of 4 and 4 steps and the rest; an epoch ends at 15


def go(recipe: Path, size: int, zero: int, fault: str = "", *more: str) -> list[int | None]:
    arguments = ["--recipe", str(recipe), "--ds_config", f"ds_configs/zero{zero}.json", *more]
    codes = end(start(size, arguments, recipe.parent / "log.txt", {"LVTRAIN_FAULT": fault}), 500.0)
    return codes


def said(recipe: Path) -> str:
    return (recipe.parent / "log.txt").read_text()


def make(folder: Path, faces: Path, **changes: Any) -> Path:
    longer = {"schedule": {"total": f"{TOTAL} steps"}, "ema": {"decay": 0.9}}
    return recipe_file(folder, faces / "train", **(longer | changes))


def folder_of(recipe: Path) -> Path:
    return recipe.parent / "runs" / "tiny"


def differing(left: Path, right: Path) -> list[str]:
    ours, theirs = contents(folder_of(left)), contents(folder_of(right))
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def disturb(recipe: Path, zero: int, faults: list[str]) -> None:
    """Starts the run again and again, each time with the next fault, then to its end."""
    for fault in faults:
        codes = go(recipe, 2, zero, fault)
        wanted = 75 if fault.endswith("sigterm") else -9
        assert wanted in codes, f"{fault}: {codes}\n{said(recipe)[-2000:]}"
    assert go(recipe, 2, zero) == [0, 0], said(recipe)[-2000:]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_resume_is_bitwise(tiny_faces: Path, tmp_path: Path, zero: int) -> None:
    """A request to stop in the second phase, a kill just past the epoch's end: weights, moments, rows, banks, EMA, BatchNorm, metrics."""
    peaceful, disturbed = make(tmp_path / "a", tiny_faces), make(tmp_path / "b", tiny_faces)
    assert go(peaceful, 2, zero) == [0, 0], said(peaceful)[-2000:]
    disturb(disturbed, zero, ["loop.step:0:5:sigterm", "loop.step:1:16:sigkill"])
    names = contents(folder_of(peaceful))
    assert {"classifier.weight", "classifier.expectation", "backbone.adam_step"} <= names.keys()
    assert any(name.startswith("ema.") for name in names) and any("running_var" in name for name in names)
    assert f"metrics of step {TOTAL}" in names
    assert not differing(peaceful, disturbed)
    assert [row["step"] for row in events(folder_of(disturbed), "resume")][1] in (12, 15)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_resume_from_every_step_is_bitwise(tiny_faces: Path, tmp_path: Path, zero: int) -> None:
    peaceful, disturbed = make(tmp_path / "a", tiny_faces), make(tmp_path / "b", tiny_faces)
    assert go(peaceful, 2, zero) == [0, 0], said(peaceful)[-2000:]
    # asked to stop in step k, ranks agree one step later, so every second step
    disturb(disturbed, zero, [f"loop.step:1:{step}:sigterm" for step in range(0, TOTAL - 2, 2)])
    assert not differing(peaceful, disturbed)


def test_resume_on_other_ranks_and_another_stage_trains_alike(tiny_faces: Path, tmp_path: Path) -> None:
    """2 ranks ZeRO-2 -> 1 rank ZeRO-1 -> 4 ranks ZeRO-3 -> 2 ranks ZeRO-2, through phase changes, without a conversion step."""
    peaceful, wandering = make(tmp_path / "a", tiny_faces), make(tmp_path / "b", tiny_faces)
    assert go(peaceful, 2, 2) == [0, 0], said(peaceful)[-2000:]
    for size, zero, step in ((2, 2, 2), (1, 1, 6), (4, 3, 10)):
        assert go(wandering, size, zero, f"loop.step:0:{step}:sigterm") == [75] * size, said(wandering)[-2000:]
    assert go(wandering, 2, 2) == [0, 0], said(wandering)[-2000:]
    ours, theirs = metrics(folder_of(wandering)), metrics(folder_of(peaceful))
    assert [row["samples_seen"] for row in ours] == [row["samples_seen"] for row in theirs]
    changed = events(folder_of(wandering), "resume")[0]["step"]  # the first step on another number of ranks starts from the same bits
    for row, reference in zip(ours, theirs):
        tolerance = 1e-6 if row["step"] == changed + 1 else 2e-5
        assert row["loss"] == pytest.approx(reference["loss"], rel=tolerance), row["step"]


def test_damage_falls_back_and_ends_with_the_same_bits(tiny_faces: Path, tmp_path: Path) -> None:
    peaceful, disturbed = make(tmp_path / "a", tiny_faces), make(tmp_path / "b", tiny_faces)
    assert go(peaceful, 1, 2) == [0], said(peaceful)[-2000:]
    assert go(disturbed, 1, 2, "loop.step:0:14:sigkill") == [-9]
    newest = max((folder_of(disturbed) / "checkpoints").glob("step_*"))
    data = bytearray((newest / "rank_00000.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "rank_00000.safetensors").write_bytes(data)
    assert go(disturbed, 1, 2) == [0], said(disturbed)[-2000:]
    assert "was altered" in said(disturbed)
    assert not differing(peaceful, disturbed)
    # with nothing valid left there is an error, and no fresh start
    for folder in (folder_of(disturbed) / "checkpoints").glob("step_*"):
        (folder / "manifest.json").write_text("{}")
    assert go(disturbed, 1, 2) == [2]
    assert "none is valid" in said(disturbed)


def test_outputs_that_are_not_finite(tiny_faces: Path, tmp_path: Path) -> None:
    """Once: skipped on all ranks alike. Three times in a row: the run stops with a checkpoint from before them, and goes on from there."""
    peaceful, once, thrice = (make(tmp_path / name, tiny_faces) for name in "abc")
    assert go(once, 2, 2, "loop.outputs:1:6:nan") == [0, 0], said(once)[-2000:]
    assert [row["step"] for row in events(folder_of(once), "nonfinite")] == [6]
    assert go(thrice, 2, 2, ";".join(f"loop.outputs:0:{step}:nan" for step in (10, 11, 12))) == [2, 2]
    assert "not finite in 3 steps in a row from step 10" in said(thrice)
    assert go(thrice, 2, 2) == [0, 0], said(thrice)[-2000:]
    assert [row["step"] for row in events(folder_of(thrice), "resume")] == [10]
    assert go(peaceful, 2, 2) == [0, 0], said(peaceful)[-2000:]
    assert not [name for name in differing(peaceful, thrice) if not name.startswith("metrics")]


def test_a_second_job_is_fenced_off_before_it_touches_anything(tiny_faces: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, tiny_faces)
    assert go(recipe, 1, 2, "loop.step:0:5:sigterm") == [75], said(recipe)[-2000:]
    watched = ("recipe.yaml", "run.json", "outcome.json", "events.jsonl", "environment.json")
    before = {name: (folder_of(recipe) / name).read_bytes() for name in watched}
    with hold(folder_of(recipe), World(0, 1, 0, torch.device("cpu"))):
        assert go(recipe, 1, 2) == [2]
    assert f"{folder_of(recipe)} is in use by process" in said(recipe)
    assert {name: (folder_of(recipe) / name).read_bytes() for name in watched} == before
    assert go(recipe, 1, 2) == [0], said(recipe)[-2000:]


def test_stopped_and_resumed_through_deepspeeds_launcher(tiny_faces: Path, tmp_path: Path) -> None:
    """Ctrl-C, then SIGTERM to `deepspeed` and all it started: each time saved at one step, and ended with the bits of an undisturbed run."""
    peaceful, disturbed = make(tmp_path / "a", tiny_faces), make(tmp_path / "b", tiny_faces)
    assert go(peaceful, 2, 2) == [0, 0], said(peaceful)[-2000:]

    def launch(step: int, number: signal.Signals | None = None) -> str:
        """Runs the launcher; the ranks wait at `step` until they have been sent the signal. Returns what was said."""
        hold_file, log = tmp_path / f"hold_{step}", tmp_path / f"launcher_{step}.txt"
        command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "lvtrain/main.py"]
        command += ["--recipe", str(disturbed), "--ds_config", "ds_configs/zero2.json"]
        settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        if number is not None:
            hold_file.touch()
            settings["LVTRAIN_FAULT"] = f"loop.step:*:{step}:hold={hold_file}"
        with log.open("w") as file:
            # a session of its own, so that a signal reaches exactly the launcher and all it started
            job = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | settings, stdout=file, stderr=file, start_new_session=True
            )
        if number is not None:
            try:
                while len(rows(folder_of(disturbed))) < step:
                    assert job.poll() is None, log.read_text()[-2000:]
                    time.sleep(0.1)
                os.killpg(job.pid, number)
                time.sleep(1.0)  # noted by ranks that wait at their step
            finally:
                hold_file.unlink()
        job.wait(300)
        while not over(job.pid):  # the launcher's front end ends before the ranks it started
            time.sleep(0.1)
        return log.read_text()

    assert "stopping after this step" in launch(5, signal.SIGINT)
    assert "SIGTERM, seen after step" in launch(10, signal.SIGTERM)
    text = launch(TOTAL)
    assert "the schedule is complete" in text, text[-2000:]
    assert len(events(folder_of(disturbed), "stop")) == 2 and not differing(peaceful, disturbed)


def over(group: int) -> bool:
    """Is every process of the group gone?"""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False
