"""The page of `tools/health.py`: what was not run again is kept."""

from __future__ import annotations

import json
from pathlib import Path

from tools.health import Run
from tools.health_runs.table import write_results


def test_what_was_not_run_is_kept(tmp_path: Path) -> None:
    fault = Run("dead units", 1, {}, tmp_path, expected=("dead",), is_fault=True, named={"dead": 10})
    missed = Run("dead units", 2, {}, tmp_path, expected=("dead",), is_fault=True)
    write_results([fault, missed, Run("arcface", 3, {}, tmp_path)], tmp_path)
    first = json.loads((tmp_path / "health.json").read_text())
    assert (first["recall"], first["runs"], first["seeds"], first["healthy"]) == (0.5, 2, [1, 2], 1)
    assert first["faults"]["dead units"]["named"] == 1 and first["false_alarms"] == {}
    cost = {"ratio": 0.004, "name": "vit_nano", "batch": 64, "accumulation": 2, "log_every": 10, "host_waits": {}}
    write_results([Run("dino", 4, {}, tmp_path, named={"labels": 50}, error="stopped")], tmp_path, cost)
    second = json.loads((tmp_path / "health.json").read_text())
    assert second["faults"] == first["faults"] and second["seeds"] == [1, 2]
    assert (second["healthy"], second["healthy_seeds"], second["failed"]) == (1, [4], ["dino"])
    assert second["false_alarms"] == {"dino (4)": {"labels": 50}} and second["cost"] == cost
    assert "0.40%" in (tmp_path / "health.md").read_text()
