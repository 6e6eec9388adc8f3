"""Saved on R ranks, read on R': rows by class id bit for bit, each rank reading only its own; one job at a time in a run folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lvtrain.checkpoint import plan as layout
from lvtrain.checkpoint.checkpoints import Checkpoints
from lvtrain.checkpoint.lease import Lease, Takeover, hold
from lvtrain.checkpoint.plan import describe, plan
from lvtrain.checkpoint.state import Replicated, Rows, State
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from tests.ranks import run_ranks

CLASS_COUNTS = (1, 2, 3, 4, 11, 10007)


def _whole(classes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    return {
        "weight": torch.randn(classes, 5, generator=generator),
        "momentum": torch.randn(classes, 5, generator=generator).bfloat16(),
        "last_step": torch.randint(0, 1 << 40, (classes,), generator=generator),
    }


def _pass_on(rank: int, size: int, folder: str, step: int) -> dict[int, list[str]]:
    """Takes the newest checkpoint of every class count, checks its rows, saves it again as `step`. Returns the files each rank opened."""
    world = World(rank, size, rank, torch.device("cpu"))
    opened = {}
    for classes in CLASS_COUNTS:
        start, stop = classes * rank // size, classes * (rank + 1) // size
        mine = {name: tensor[start:stop] for name, tensor in _whole(classes).items()}
        run = Path(folder) / str(classes)
        with (
            hold(run, world) as lease,
            Checkpoints(run, world, run_id="r", fingerprint="f", lease=lease) as checkpoints,
        ):
            found = checkpoints.newest()
            if found is not None:
                reader = checkpoints.load(found)
                read = {name: reader.rows(name, start, stop) for name in mine}
                for name, tensor in mine.items():
                    assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), (classes, name)
                opened[classes] = sorted(reader.opened)
                assert float(reader.replicated("scalar")) == 7.0
                reader.finish()
                mine = read
            state: State = {name: Rows(tensor, start, classes) for name, tensor in mine.items()}
            checkpoints.save(step, step, "one", state | {"scalar": Replicated(torch.tensor(7.0))}, {})
            checkpoints.wait()
    return opened


def test_rows_go_through_any_number_of_ranks(tmp_path: Path) -> None:
    for step, size in enumerate((2, 1, 3, 2), start=1):
        opened = run_ranks(size, _pass_on, str(tmp_path), step)
    # 3 ranks -> 2: rank 0 needs rows of files 0 and 1, rank 1 of files 1 and 2, and no others
    assert [files[10007] for files in opened] == [
        ["rank_00000.safetensors", "rank_00001.safetensors"],
        ["rank_00001.safetensors", "rank_00002.safetensors"],
    ]


def _with_a_stale_listing(rank: int, size: int, folder: str) -> int | None:
    if rank == 1:
        layout.committed = lambda _: []
    world = World(rank, size, rank, torch.device("cpu"))
    run = Path(folder)
    with hold(run, world) as lease, Checkpoints(run, world, run_id="r", fingerprint="f", lease=lease) as checkpoints:
        found = checkpoints.newest()
    return found and found.step


def test_a_rank_whose_file_system_lags_follows_rank_0(tmp_path: Path) -> None:
    run_ranks(1, _pass_on, str(tmp_path), 5)
    assert run_ranks(2, _with_a_stale_listing, str(tmp_path / "11")) == [5, 5]


def test_ranks_that_disagree_are_found_before_anything_is_written() -> None:
    def entries(state: State) -> Any:
        return describe(state)

    rows = {"w": Rows(torch.zeros(3, 2), 0, 7)}
    with pytest.raises(RuntimeError, match=r"\[0, 7\)"):
        plan(rows, 0, [entries(rows), entries({"w": Rows(torch.zeros(3, 2), 4, 7)})])
    with pytest.raises(RuntimeError, match="different tensors"):
        plan(rows, 0, [entries(rows), entries({"v": Rows(torch.zeros(4, 2), 3, 7)})])
    with pytest.raises(RuntimeError, match="disagree on w"):
        plan(rows, 0, [entries(rows), entries({"w": Rows(torch.zeros(4, 2, dtype=torch.float64), 3, 7)})])


def test_replicated_tensors_are_shared_out_and_left_to_who_has_them() -> None:
    meta = torch.empty(4, device="meta")
    states: list[State] = [
        {
            "a": Replicated(torch.ones(4)),
            "b": Replicated(meta),
            "c": Replicated(torch.ones(100)),
            "d": Replicated(torch.ones(9)),
        },
        {
            "a": Replicated(meta),
            "b": Replicated(torch.ones(4)),
            "c": Replicated(torch.ones(100)),
            "d": Replicated(torch.ones(9)),
        },
    ]
    described = [describe(state) for state in states]
    mine = [set(plan(state, rank, described).mine) for rank, state in enumerate(states)]
    assert mine == [{"a", "c"}, {"b", "d"}]
    with pytest.raises(RuntimeError, match=r"of a$"):
        plan({"a": Replicated(meta)}, 0, [describe({"a": Replicated(meta)})])


# ------------------------------------------------------------------------------------------------------------------- the lease


def _hold(folder: str, queue: Any) -> None:
    Lease(Path(folder), heartbeat=0.05)
    queue.put("held")
    time.sleep(60)


def _holder(folder: Path) -> Any:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_hold, args=(str(folder), queue))
    process.start()
    assert queue.get(timeout=60) == "held"
    return process


def test_a_second_job_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(tmp_path: Path) -> None:
    first = _holder(tmp_path)
    with pytest.raises(UserError, match=rf"\b{first.pid}\b"):
        Lease(tmp_path)
    first.kill()
    first.join()
    began = time.monotonic()
    second = Lease(tmp_path)
    assert time.monotonic() - began < 20  # at once, not after the time a heartbeat may stand still
    second.check()
    second.release()
    assert not (tmp_path / "lease.json").exists()


def test_a_dead_job_of_another_host_is_known_by_its_still_heartbeat(tmp_path: Path) -> None:
    """And one that was only frozen is fenced off when it wakes."""
    frozen = Lease(tmp_path, heartbeat=3600)
    holder = json.loads((tmp_path / "lease.json").read_text())
    (tmp_path / "lease.json").write_text(json.dumps(holder | {"host": "elsewhere"}))
    waited: list[float] = []
    second = Lease(tmp_path, stale_after=3.0, sleep=waited.append)
    assert sum(waited) == 3.0
    with pytest.raises(Takeover, match="process"):
        frozen.check()
    second.check()
    frozen.release()
    second.check()  # the loser's release does not take the winner's lease away
    second.release()


def test_a_job_elsewhere_that_still_beats_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    Lease(tmp_path, heartbeat=3600)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))

    def sleep_and_beat(_: float) -> None:
        os.utime(path, ns=(time.time_ns(), time.time_ns()))

    with pytest.raises(UserError, match="elsewhere"):
        Lease(tmp_path, sleep=sleep_and_beat)


def test_an_earlier_start_of_the_same_slurm_job_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    Lease(tmp_path, heartbeat=3600)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Lease(tmp_path, heartbeat=3600).check()


def test_who_lost_the_lease_commits_nothing(tmp_path: Path) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    state: State = {"w": Replicated(torch.ones(3))}
    lease = Lease(tmp_path)
    first = Checkpoints(tmp_path, world, run_id="r", fingerprint="f", lease=lease)
    first.save(1, 1, "one", state, {})
    first.wait()
    holder = json.loads((tmp_path / "lease.json").read_text())
    (tmp_path / "lease.json").write_text(json.dumps(holder | {"token": "another's"}))
    with pytest.raises(UserError, match="taken over"):
        first.save(2, 2, "one", state, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000000001"]
    first.close()
    lease.release()
