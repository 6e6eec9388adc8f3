"""Whose run folder it is: a holder in another container, and a job that wakes up after it was replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lvtrain.checkpoint.lease import FolderInUse, Lease
from lvtrain.distributed.world import World
from lvtrain.training.telemetry import Telemetry
from lvtrain.training.trackers import TrackedRun

ALONE = World(0, 1, 0, torch.device("cpu"))


def holder(folder: Path, **changes: Any) -> Path:
    """The lease of a process that does not exist here."""
    Lease(folder).release()
    living = Lease(folder)
    path = folder / "lease.json"
    values = json.loads(path.read_text())
    living.release()
    path.write_text(json.dumps(values | {"token": "theirs", "pid": 4_000_000} | changes))
    return path


def test_the_death_of_a_process_is_only_seen_in_its_own_container(tmp_path: Path) -> None:
    slept: list[float] = []
    holder(tmp_path)
    Lease(tmp_path, sleep=slept.append).release()
    assert slept == [], "it is dead, and that can be seen here"

    path = holder(tmp_path, processes="another boot, or another namespace")

    def beat(seconds: float) -> None:
        slept.append(seconds)
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000_000))

    with pytest.raises(FolderInUse, match="4000000"):
        Lease(tmp_path, sleep=beat)
    assert slept, "it may live elsewhere, so its heartbeat decides"


def test_a_replaced_job_writes_no_row(tmp_path: Path) -> None:
    first = Lease(tmp_path)
    written = Telemetry(TrackedRun(tmp_path, "run", {}), ALONE, fence=first)
    written.metrics({"step": 1})
    values = json.loads(first.path.read_text())
    first.path.write_text(json.dumps(values | {"token": "of the job that took over"}))
    for write in (lambda: written.metrics({"step": 2}), lambda: written.event("x")):
        with pytest.raises(FolderInUse):
            write()
    with pytest.raises(FolderInUse):
        written.evaluation("final", {"benchmarks": {}})
    first.release()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]
    assert not (tmp_path / "events.jsonl").exists() and not (tmp_path / "evaluation").exists()
