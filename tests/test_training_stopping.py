"""Stopping on request: flags, agreement, deadline, heartbeat and watchdog, outcome.json."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lvtrain import signals
from lvtrain.distributed.world import World
from lvtrain.training import outcome
from lvtrain.training.heartbeat import EXIT_HUNG, Beat, Heartbeat, behind, read_all
from lvtrain.training.outcome import Outcome
from lvtrain.training.stopping import Deadline, Stopping
from tests.ranks import run_ranks

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_only_sets_a_flag(number: int) -> None:
    before = signal.getsignal(number)
    with Stopping(ALONE) as stopping:
        assert signals.received() is None and not stopping.should_stop(1)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's own, after the one that was asked for
        assert signals.received() == number
        assert stopping.should_stop(2) and stopping.should_stop(3)
        assert stopping.reason == f"{signal.Signals(number).name}, seen after step 2"
    assert signal.getsignal(number) == before


def test_a_signal_before_the_ranks_meet_and_one_while_closing_are_heard() -> None:
    """`main.py` listens from its first line to its last."""
    before = signal.getsignal(signal.SIGTERM)
    signals.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    with Stopping(ALONE) as stopping:
        assert stopping.should_stop(1)
    os.kill(os.getpid(), signal.SIGTERM)  # would end the process before it has written outcome.json
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) == before and signals.received() is None


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def signalled(rank: int, world_size: int, who: int, at_step: int) -> tuple[int, str | None]:
    with Stopping(World(rank, world_size, rank, torch.device("cpu"))) as stopping:
        for step in range(1, 50):
            if rank == who and step == at_step:
                os.kill(os.getpid(), signal.SIGUSR2)
            if stopping.should_stop(step):
                return step, stopping.reason
    raise AssertionError("never stopped")


def out_of_time(rank: int, world_size: int) -> tuple[int, float, str | None]:
    """Steps take 10 s on rank 0 and 1 s on the others; saving took 20 s; 300 s are allotted."""
    clock = Clock()
    with Stopping(World(rank, world_size, rank, torch.device("cpu")), 300.0, clock=clock) as stopping:
        stopping.saved(20.0)
        for step in range(1, 100):
            clock.now += 10.0 if rank == 0 else 1.0
            if stopping.should_stop(step):
                return step, clock.now, stopping.reason
    raise AssertionError("never stopped")


def both(rank: int, world_size: int) -> tuple[list[tuple[int, str | None]], tuple[int, float, str | None]]:
    """In one start of the ranks, because starting them is what takes long."""
    cases = [(0, 1), (0, 12), (world_size - 1, 7)]
    return [signalled(rank, world_size, who, at_step) for who, at_step in cases], out_of_time(rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_stop_after_the_same_step(world_size: int) -> None:
    """Whichever rank is signalled, at most one step later; when time runs out, early enough for the slowest rank to save."""
    answers = run_ranks(world_size, both)
    later = int(world_size > 1)
    for case, (who, at_step) in enumerate([(0, 1), (0, 12), (world_size - 1, 7)]):
        stops = [answer[0][case] for answer in answers]
        assert {step for step, _ in stops} == {at_step + later}
        assert "SIGUSR2" in stops[who][1] and f"step {at_step + later}" in stops[who][1]
        assert all(reason for _, reason in stops)
    step, now, reason = answers[0][1]
    assert {answer[1][0] for answer in answers} == {step}
    assert now + 20.0 <= 300.0 and now >= 200.0
    assert "SIG" not in reason and f"step {step}" in reason


def test_the_reserve_grows_with_what_was_seen() -> None:
    deadline = Deadline(allotted=3600.0, started=1000.0)
    assert deadline.reserve() == 2 * 60 + 30  # no step and no save seen yet
    deadline.steps.extend([0.5, 4.0, 0.6])
    deadline.save = 100.0
    assert deadline.reserve() == 2 * 4.0 + 200.0 + 30.0
    assert not deadline.is_near(1000.0 + 3600.0 - 238.5) and deadline.is_near(1000.0 + 3600.0 - 238.0)
    assert Deadline(allotted=20.0, started=0.0).reserve() == pytest.approx(2 * 2 + 1)


# ----------------------------------------------------------------------------------------------------- outcome.json


def test_an_outcome_is_read_as_written(tmp_path: Path) -> None:
    assert outcome.read(tmp_path) is None
    written = Outcome("requeue", "alignment", 120, "SIGUSR2, seen after step 120", 3)
    outcome.write(tmp_path, written)
    assert outcome.read(tmp_path) == written and written.exit_code == 75
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
    for torn in ("", "{", "[]", json.dumps({"outcome": "maybe", "phase": "p", "step": 1, "reason": "", "attempt": 1})):
        outcome.path_in(tmp_path).write_text(torn)
        assert outcome.read(tmp_path) is None


def test_progress_is_the_newest_committed_step(tmp_path: Path) -> None:
    assert outcome.committed_step(tmp_path) == 0
    for name, committed in [
        ("step_000000200", True),
        ("step_000001000", False),
        (".step_000003000.new", True),
        ("step_x", True),
    ]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if committed:
            (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert outcome.committed_step(tmp_path) == 200


# -------------------------------------------------------------------------------------------- heartbeat and watchdog


def beat(rank: int, step: int, doing: str, since: float, written: float) -> Beat:
    return Beat(rank, "host", 2**22 + rank, step, doing, since, written)


def write_beats(folder: Path, *beats: Beat) -> None:
    for each in beats:
        (folder / f"rank_{each.rank:05d}.json").write_text(json.dumps(each.__dict__))


def test_the_rank_the_others_wait_for_is_named(tmp_path: Path) -> None:
    assert "rank" not in behind(tmp_path)
    write_beats(tmp_path, beat(0, 9, "vote", 100, 498), beat(1, 9, "data", 90, 499), beat(2, 9, "vote", 101, 497))
    assert all(part in behind(tmp_path, now=500) for part in ("rank 1 on host", "'data'", "step 9"))
    write_beats(tmp_path, beat(2, 9, "vote", 101, 120))  # its watchdog fell silent too: the process is frozen or gone
    assert all(part in behind(tmp_path, now=500) for part in ("rank 2 on host", "watchdog", "380 s"))
    (tmp_path / "rank_00003.json").write_text("{")
    assert len(read_all(tmp_path)) == 3


def test_a_healthy_rank_leaves_nothing_behind(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 3, timeout_seconds=60, interval_seconds=0.01) as heart:
        heart.beat(7, "data")
        deadline = time.monotonic() + 10
        while not any(each.doing == "data" for each in read_all(heart.folder)) and time.monotonic() < deadline:
            time.sleep(0.01)
        (seen,) = read_all(heart.folder)
    assert (seen.rank, seen.step, seen.doing, seen.pid) == (3, 7, "data", os.getpid())
    assert read_all(heart.folder) == [] and not heart.log.exists()


HUNG = """
import ctypes, sys, time
from pathlib import Path
from lvtrain.training.heartbeat import Heartbeat

def waits_for_ever():
    {wait}

with Heartbeat(Path(sys.argv[1]), 1, timeout_seconds=1.0, interval_seconds=0.1) as heart:
    heart.beat(12, "data")
    waits_for_ever()
"""


@pytest.mark.parametrize(
    ("wait", "code"),
    [
        ("time.sleep(60)", EXIT_HUNG),
        # a C call that never releases the interpreter's lock: no Python thread can notice, but faulthandler's timer does
        ("ctypes.PyDLL(None).sleep(60)", 1),
    ],
)
def test_a_hung_rank_ends_with_its_stack_in_the_log(tmp_path: Path, wait: str, code: int) -> None:
    program = [sys.executable, "-c", HUNG.format(wait=wait), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=50)
    assert done.returncode == code, done.stderr
    log = (tmp_path / "logs" / "stacks_rank_00001.log").read_text()
    assert "waits_for_ever" in log
    if code == EXIT_HUNG:
        assert "rank 1" in done.stderr and "'data' of step 12" in done.stderr
        assert log.count("'data' of step 12") >= 2  # a warning at half time and the end
