"""Two jobs and one run folder: a doubled job is refused, a job that thaws after it was replaced changes nothing."""

from __future__ import annotations

import os
import re
import signal
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs import metrics, output, recipe_file, run
from tools.trial import start

HEADING = "## Who may write into a run folder"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fenced() -> list[str]:
    """The patterns of the table of files in the trainer's page."""
    page = (ROOT / "lvtrain" / "training" / "README.md").read_text().split(HEADING)[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    return [pattern for row in rows for pattern in re.findall("`([^`]+)`", row)]


def wait_for(what: str, happens) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def is_frozen(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.fixture
def recipe(tiny_faces: Path, tmp_path: Path) -> Path:
    return recipe_file(
        tmp_path,
        tiny_faces / "train",
        schedule={"total": "8 steps", "warmup": "1 steps"},
        logging={"every": 1, "trackers": ["tensorboard"]},
        evaluation={"benchmarks": {"heldout": str(tiny_faces / "heldout.bin")}, "every": "100 steps"},
    )


def test_a_job_that_thaws_after_it_was_replaced_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    command = ["--recipe", str(recipe), "--ds_config", "ds_configs/zero2.json"]
    first = start(2, command, tmp_path / "first.txt", {"LVTRAIN_FAULT": "loop.step:*:5:sigstop"})
    ranks = [process.pid for process in first]
    try:
        wait_for("the job freezes", lambda: all(is_frozen(rank) for rank in ranks if rank))
        os.utime(folder / "lease.json", (0, 0))  # so the next job need not see for half a minute that it stands still
        assert run(recipe, ranks=2, environment={"LVTRAIN_FAULT": "loop.outputs:1:6:nan"}) == 0, output(recipe)
        after = files_of(folder)
        for rank in ranks:
            os.kill(rank or 0, signal.SIGCONT)
        for process in first:
            process.join(120)
    finally:
        for process in first:
            process.kill()
    assert first[0].exitcode == 2 and first[1].exitcode in (1, 2), (tmp_path / "first.txt").read_text()
    assert files_of(folder) == after
    assert [row["step"] for row in metrics(folder)] == list(range(1, 9))
    # and every file has a fence
    patterns = fenced()
    assert [name for name in after if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    left = {"lease.json", "heartbeat/rank_*.json", "logs/stacks_rank_*.log"}  # what a job removes at its end
    assert {pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in after)} <= left


def test_a_doubled_job_is_refused_and_the_first_goes_on(recipe: Path, tmp_path: Path) -> None:
    folder, gate = tmp_path / "runs" / "tiny", tmp_path / "gate"
    gate.touch()
    command = ["--recipe", str(recipe), "--ds_config", "ds_configs/zero2.json"]
    first = start(1, command, tmp_path / "first.txt", {"LVTRAIN_FAULT": f"loop.step:*:5:hold={gate}"})
    try:
        wait_for("five steps", lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) == 5)
        before = files_of(folder)
        assert run(recipe) == 2 and "in use" in output(recipe)
        changed = {name for name, data in files_of(folder).items() if before.get(name) != data}
        assert all(name.startswith(("lease.json", "heartbeat/")) for name in changed)
        gate.unlink()
        first[0].join(120)
    finally:
        first[0].kill()
    assert first[0].exitcode == 0, (tmp_path / "first.txt").read_text()
    assert [row["step"] for row in metrics(folder)] == list(range(1, 9))
