"""`tools/benchmark.py all`: every subject runs on a CPU, small, and prints what it promises as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

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
