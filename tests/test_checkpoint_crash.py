"""Killed at any point of a save, a retention or a load: the next start resumes from the last committed step, with the same bits.

The job is a toy whose state is a function of its steps, on one or two gloo ranks, each a forked process; a fault point does the killing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lvtrain import faults
from lvtrain.checkpoint import files as files
from lvtrain.checkpoint import plan as layout
from lvtrain.checkpoint.checkpoints import Checkpoints, open_weights
from lvtrain.checkpoint.lease import hold
from lvtrain.checkpoint.state import Replicated, Rows, State
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.files import patience
from tools.kills import POINTS

STEPS, EVERY, CLASSES = 12, 2, 7
SAVE_POINTS = (*POINTS, "retention.begin", "retention.end")


def advance(weights: torch.Tensor, rows: torch.Tensor, step: int) -> None:
    weights.mul_(0.9).add_(step)
    rows.mul_(0.7).add_(weights.sum())


def job(rank: int, size: int, folder: str, outcomes: Any) -> None:
    """Trains to STEPS, saving every EVERY; reports (first step, resumed from, how it ended)."""
    world = World(rank, size, rank, torch.device("cpu"))
    start, stop = CLASSES * rank // size, CLASSES * (rank + 1) // size
    weights, rows = torch.zeros(5), torch.arange(float(stop - start)).add(start).unsqueeze(1).repeat(1, 3)
    step = 0
    try:
        with (
            hold(Path(folder), world) as lease,
            Checkpoints(Path(folder), world, run_id="r", fingerprint="f", lease=lease) as checkpoints,
        ):
            found = checkpoints.newest()
            if found is not None:
                reader = checkpoints.load(found)
                weights.copy_(reader.replicated("w"))
                rows.copy_(reader.rows("rows", start, stop))
                reader.finish()
                step = found.step
            first = step
            while step < STEPS:
                advance(weights, rows, step)
                step += 1
                faults.point("loop.step", rank=rank, step=step)
                if step % EVERY == 0:
                    state: State = {"w": Replicated(weights), "rows": Rows(rows, start, CLASSES)}
                    checkpoints.save(step, step, "one", state, {})
            checkpoints.wait()
        outcomes.put((rank, first, "done"))
    except UserError as error:
        outcomes.put((rank, step, f"refused: {error}"))
    except OSError as error:
        outcomes.put((rank, step, f"crashed: {error}"))
    except Exception as error:
        outcomes.put((rank, step, f"failed: {type(error).__name__}: {error}"))


def _enter(rank: int, size: int, folder: str, store: str, outcomes: Any) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=240)
        )
    job(rank, size, folder, outcomes)
    outcomes.close()
    outcomes.join_thread()
    os._exit(0)  # gloo may abort when a peer is gone; the result is already reported


def start(folder: Path, size: int, fault: str = "") -> tuple[list[Any], Any]:
    context = multiprocessing.get_context("fork")
    outcomes = context.Queue()
    os.environ[faults.VARIABLE] = fault
    store = folder / f"store_{time.monotonic_ns()}"
    processes = [
        context.Process(target=_enter, args=(rank, size, str(folder), str(store), outcomes)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    os.environ.pop(faults.VARIABLE)
    return processes, outcomes


def run(folder: Path, size: int, fault: str = "") -> tuple[list[int | None], dict[int, tuple[int, str]]]:
    """Exit codes by rank, and the results that ranks reported."""
    folder.mkdir(exist_ok=True)
    processes, outcomes = start(folder, size, fault)
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"rank {processes.index(process)} hangs with fault {fault!r}")
    ends = {}
    while not outcomes.empty():
        rank, first, ended = outcomes.get()
        ends[rank] = first, ended
    return [process.exitcode for process in processes], ends


def final(folder: Path) -> dict[str, bytes]:
    opened = open_weights(folder)
    assert opened.step == STEPS
    rows = opened.reader.rows("rows", 0, CLASSES)
    return {"w": opened.reader.replicated("w").numpy().tobytes(), "rows": rows.numpy().tobytes()}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS", (0.01, 0.01))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, bytes]]:
    finals = {}
    for size in (1, 2):
        folder = tmp_path_factory.mktemp(f"undisturbed{size}")
        assert run(folder, size)[1] == {rank: (0, "done") for rank in range(size)}
        finals[size] = final(folder)
    return finals


def committed_steps(folder: Path) -> list[int]:
    return sorted(files.step_of(path) or 0 for path in layout.committed(folder / "checkpoints"))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_killed_in_a_save(tmp_path: Path, undisturbed: dict[int, dict[str, bytes]], point: str, size: int) -> None:
    """Rank 0 dies while it saves step 8, steps 4 and 6 being there."""
    codes, _ = run(tmp_path, size, f"{point}:0:8:sigkill")
    assert codes[0] == -signal.SIGKILL
    visible = committed_steps(tmp_path)
    renamed = point in SAVE_POINTS[SAVE_POINTS.index("save.after_rename") :]
    assert visible[-1] == (8 if renamed else 6)
    codes, ends = run(tmp_path, size)
    assert ends == {rank: (visible[-1], "done") for rank in range(size)}
    assert final(tmp_path) == undisturbed[size]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000000010", "step_000000012"]


@pytest.mark.parametrize("point", ["save.after_mkdir", "save.mid_file", "save.after_files"])
def test_another_rank_killed_in_a_save(tmp_path: Path, undisturbed: dict[int, dict[str, bytes]], point: str) -> None:
    codes, ends = run(tmp_path, 2, f"{point}:1:8:sigkill")
    assert codes[1] == -signal.SIGKILL and ends[0][1].startswith("failed")
    assert committed_steps(tmp_path) == [4, 6]
    assert run(tmp_path, 2)[1] == {0: (6, "done"), 1: (6, "done")}
    assert final(tmp_path) == undisturbed[2]


def test_all_ranks_killed_while_loading(tmp_path: Path, undisturbed: dict[int, dict[str, bytes]]) -> None:
    run(tmp_path, 2, "loop.step:*:11:sigkill")
    newest = committed_steps(tmp_path)[-1]
    assert newest in (8, 10)  # 10 may still have been in writing
    assert run(tmp_path, 2, "load.begin:*:*:sigkill")[0] == [-signal.SIGKILL] * 2
    assert run(tmp_path, 2)[1] == {0: (newest, "done"), 1: (newest, "done")}
    assert final(tmp_path) == undisturbed[2]


def test_a_rank_that_lags_is_waited_for(tmp_path: Path) -> None:
    """Rank 1 stands still in the save of step 8 and is killed there: rank 0, long finished with its file, commits nothing."""
    (tmp_path / "hold").touch()
    processes, _ = start(tmp_path, 2, f"save.mid_file:1:8:hold={tmp_path / 'hold'}")
    _until(
        lambda: any(path.name.startswith(".writing_step_000000008") for path in (tmp_path / "checkpoints").glob(".*"))
    )
    time.sleep(1.0)
    assert committed_steps(tmp_path)[-1] == 6
    for process in reversed(processes):
        process.kill()
        process.join()
    assert committed_steps(tmp_path)[-1] == 6
    assert run(tmp_path, 2)[1] == {0: (6, "done"), 1: (6, "done")}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_stops_all_alike(
    tmp_path: Path, undisturbed: dict[int, dict[str, bytes]], rank: int
) -> None:
    codes, ends = run(tmp_path, 2, f"save.mid_file:{rank}:8:enospc")
    assert codes == [0, 0]
    assert all(ended.startswith("refused") and "No space left" in ended for _, ended in ends.values())
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_000000004", "step_000000006"]
    assert run(tmp_path, 2)[1] == {0: (6, "done"), 1: (6, "done")}
    assert final(tmp_path) == undisturbed[2]


def test_a_passing_error_costs_one_checkpoint_and_no_training(
    tmp_path: Path, undisturbed: dict[int, dict[str, bytes]]
) -> None:
    assert run(tmp_path, 2, "save.mid_file:1:8:eio")[1] == {0: (0, "done"), 1: (0, "done")}
    assert committed_steps(tmp_path) == [10, 12] and final(tmp_path) == undisturbed[2]


def test_an_error_that_stays_stops_the_run_with_the_checkpoints_it_has(tmp_path: Path) -> None:
    ends = run(tmp_path, 2, ";".join(f"save.mid_file:1:{step}:eio" for step in range(6, STEPS + 1)))[1]
    # not a UserError: a chain starts again, when the disk may work
    assert all(ended.startswith("crashed") and "Input/output error" in ended for _, ended in ends.values())
    assert committed_steps(tmp_path) == [2, 4]


def test_a_folder_that_became_read_only_stops_all_alike(tmp_path: Path) -> None:
    ends = run(tmp_path, 2, "save.before_rename:0:8:erofs")[1]
    assert all(ended.startswith("refused") and "Read-only" in ended for _, ended in ends.values())
    assert committed_steps(tmp_path) == [4, 6]


def test_there_is_always_a_valid_checkpoint(tmp_path: Path) -> None:
    """An observer checks all the time while a run saves, is killed in its retention, and resumes."""
    assert run(tmp_path, 1, "loop.step:0:5:sigkill")[0] == [-signal.SIGKILL]
    for fault in ("retention.renamed:0:8:sigkill", ""):
        processes, _ = start(tmp_path, 1, fault)
        looks, deadline = 0, time.monotonic() + 300
        while processes[0].is_alive() and time.monotonic() < deadline:
            there = layout.committed(tmp_path / "checkpoints")
            # none is whole: only if they were superseded since we looked
            assert any(map(_whole, there)) or there != layout.committed(tmp_path / "checkpoints"), there
            looks += 1
        processes[0].kill()
        processes[0].join()
    assert looks > 0 and final(tmp_path)


def _whole(path: Path) -> bool:
    try:
        content = files.read_manifest(path)
    except files.Damage:  # being deleted under the observer's eyes: another must be whole
        return False
    return all(files.check_file(path, name, content) is None for name in content["files"])


def _until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
