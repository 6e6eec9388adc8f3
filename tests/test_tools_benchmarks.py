"""`tools/benchmark.py all`: every subject runs on a CPU, small, and prints what it promises as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def test_every_subject_runs_small() -> None:
    command = [sys.executable, "tools/benchmark.py", "all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    subjects = {path.stem for path in (ROOT / "tools" / "benchmarks").glob("*.py") if "\ndef run(" in path.read_text()}
    small = {name for name in subjects if "\nSMALL" in (ROOT / "tools" / "benchmarks" / f"{name}.py").read_text()}
    assert results.keys() == small >= {"backbone", "step", "data", "classifier", "checkpoint"}
    step, backbone = results["step"], results["backbone"]
    assert 0 < backbone["mfu"] < 1.5 and 0 < step["mfu"] < 1.5 and step["images_per_second_a_rank"] > 0
    assert {"data", "forward", "classifier", "backward", "backbone optimizer", "row optimizer"} <= step["ms"].keys()
    assert step["host_waits"] == {}
    assert results["data"]["ratios"]["lvtrain_dali / dali_webdataset_reader"] > 0


@pytest.mark.slow
def test_the_health_check_waits_for_nothing() -> None:
    command = [sys.executable, "tools/benchmark.py", "health", "--batch", "16", "--steps", "10", "--every", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["host_waits"] == {} and found["steps"] == 6
    assert {"gradients", "movement", "micro-batch", "log line", "reading threads"} <= found["ratio_by_part"].keys()
