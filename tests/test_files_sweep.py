"""System calls that fail: what the preloaded library does to a process, and sweeps of the real operations (tools/faults)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tools.faults import shim

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on this machine")
MODES = {mode.name: mode for mode in shim.MODES}
PROGRAM = """
import os, sys
from pathlib import Path
from tools.faults.shim import attach
plan, folder = map(Path, sys.argv[1:])
attach(plan)
for name in ("a", "b", "c"):
    try:
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        print(name, os.write(handle, b"0123456789"))
        os.fsync(handle)
        os.close(handle)
    except OSError as error:
        print(name, error.strerror)
(folder.parent / "elsewhere").write_text("is not counted")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.build(tmp_path_factory.mktemp("shim"))


def run(library: Path, plan: shim.Plan, folder: Path) -> tuple[int, list[str]]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", PROGRAM, str(plan.path), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def test_calls_under_the_folder_are_counted_in_order(library: Path, tmp_path: Path) -> None:
    plan = shim.Plan(tmp_path / "plan", [tmp_path / "in"])
    assert run(library, plan, tmp_path / "in") == (0, ["a 10", "b 10", "c 10"])
    expected = [(call, str(tmp_path / "in" / name)) for name in "abc" for call in ("open", "write", "fsync", "close")]
    assert plan.calls() == expected


@pytest.mark.parametrize(
    ("mode", "code", "said", "sizes"),
    [
        ("EIO once", 0, ["a 10", "b Input/output error", "c 10"], [10, 0, 10]),
        ("EIO for good", 0, ["a 10", "b Input/output error", "c Input/output error"], [10, 0, 0]),
        ("ENOSPC", 0, ["a 10", "b No space left on device", "c No space left on device"], [10, 0]),
        ("short", 0, ["a 10", "b 5", "c 10"], [10, 5, 10]),
        ("torn", -signal.SIGKILL, ["a 10"], [10, 5]),
        ("kill before", -signal.SIGKILL, ["a 10"], [10, 0]),
        ("kill after", -signal.SIGKILL, ["a 10"], [10, 10]),
        ("delay", 0, ["a 10", "b 10", "c 10"], [10, 10, 10]),
    ],
)
def test_the_second_write_fails(
    library: Path, tmp_path: Path, mode: str, code: int, said: list[str], sizes: list[int]
) -> None:
    plan = shim.Plan(tmp_path / "plan", [tmp_path / "in"], MODES[mode], "write", 2)
    assert run(library, plan, tmp_path / "in") == (code, said)
    assert plan.fired() >= 1
    assert [path.stat().st_size for path in sorted((tmp_path / "in").iterdir())] == sizes


def sweep(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The trials of a sweep."""
    places = ["--folder", str(folder / "bench"), "--results", str(folder)]
    command = [sys.executable, "-m", "tools.faults", *options, *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((folder / "syscalls.json").read_text())["wrong"] == []
    return [json.loads(line) for line in (folder / "bench" / "trials.jsonl").read_text().splitlines()]


def test_a_short_sweep_finds_nothing_wrong(tmp_path: Path) -> None:
    trials = sweep(tmp_path, "--short")
    counts = Counter(trial["verdict"] for trial in trials)
    assert len(trials) == 16 and counts["survived"] and counts["refused"]
    assert {trial["site"]["operation"] for trial in trials} == {"save", "resume", "pack", "evaluate"}


@pytest.mark.slow
def test_two_ranks_end_whatever_lasts_on_one(tmp_path: Path) -> None:
    """Every call in every way: errors that last, and a rank that is gone, while the other waits for it."""
    trials = sweep(tmp_path, "--operations", "save", "--ranks", "2", "--count", "230")
    assert {trial["mode"] for trial in trials} == MODES.keys()


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_the_sweep_finds_nothing_wrong(tmp_path: Path) -> None:
    """Every call in every way, on files of many roles, in about an hour; all files of all roles would take a day."""
    trials = sweep(tmp_path, "--count", "1500")
    assert {trial["mode"] for trial in trials} == MODES.keys()
