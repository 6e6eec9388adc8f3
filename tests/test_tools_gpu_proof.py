"""The proof on a GPU, rehearsed on a device whose kernels do nothing; and what it says where it cannot prove anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakecuda.device import FakeDevice
from tools.proof import __main__ as proof
from tools.proof import child
from tools.proof.page import page
from tools.proof.part import Ended, Goal, Part
from tools.proof.parts import PARTS

KEYS = {"part", "state", "seconds", "why", "goals", "result", "log"}
FIRST = ("self_test", "kernel_tests", "repeated", "trained", "classifier", "backbone_eager", "step_rates")


def rehearse(device: FakeDevice, folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """The JSON files by part. Goals are missed there: no kernel computes anything."""
    out = folder / "gpu"
    command = ["--small", "--out", str(out), *arguments]
    ended = device.call("tools.proof.__main__:main", command, folder=folder, copy_limit=1 << 16)
    assert ended.code == 1, ended.output[-4000:]
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert all(row.keys() == KEYS for row in found.values())
    table = (out / "README.md").read_text()
    for name, row in found.items():
        assert f"| {name} |" in table and all(goal["goal"] in table for goal in row["goals"])
    return found


@pytest.mark.fakecuda
def test_the_first_parts_run(fake_device: FakeDevice, tmp_path: Path) -> None:
    found = rehearse(fake_device, tmp_path, "--minutes", "5", "--only", ",".join(FIRST))
    assert {name: (row["state"], row["why"]) for name, row in found.items()} == {
        name: ("ran", "") for name in ("environment", *FIRST)
    }
    assert "H200" in found["environment"]["result"]["gpu"]
    assert found["self_test"]["result"]["passes"] is False
    assert found["kernel_tests"]["result"]["collected"] > 5
    assert found["trained"]["result"]["compared"] > 10
    assert {"lvtrain half triton kept", "lvtrain half"} <= found["classifier"]["result"]["variants"].keys()
    assert found["step_rates"]["result"]["all_by_tenth"] > 0


@pytest.mark.fakecuda
@pytest.mark.slow
def test_every_part_runs(fake_device: FakeDevice, tmp_path: Path) -> None:
    found = rehearse(fake_device, tmp_path, "--minutes", "20")
    assert {name: row["why"] for name, row in found.items() if row["state"] != "ran"} == {}
    assert set(found) == {part.name for part in PARTS}


def test_without_a_gpu_every_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert proof.main(["--out", str(tmp_path)]) == 2
    states = {path.stem: json.loads(path.read_text())["state"] for path in tmp_path.glob("*.json")}
    assert states == {part.name: "not run" for part in PARTS} | {"environment": "ran"}


def test_a_part_whose_package_is_missing_is_named(tmp_path: Path) -> None:
    part = Part("some", "?", "environment", needs=("json", "no_such_package"))
    ended = proof.ended(part, tmp_path, until=float("inf"), small=True, why_not="")
    assert ended.state == "not run" and "no_such_package" in ended.why and "json" not in ended.why


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path: Path) -> None:
    part = Part("some", "?", "benchmark")
    failed = child.run(part, {"subject": "no_such_subject"}, tmp_path, 60)
    assert failed.state == "failed" and "ModuleNotFoundError" in failed.why
    slow = child.run(Part("slow", "?", "environment"), {}, tmp_path, 0.0)
    assert slow.state == "failed" and slow.result == {}


def test_a_goal_is_met_or_missed_and_a_figure_that_is_not_there_is_neither() -> None:
    goals = (Goal("fast", "a/ms", at_most=8.0), Goal("right", "passes", at_least=1), Goal("absent", "b"))
    part = Part("some", "?", "environment", goals=goals)
    ended = Ended(part, "ran", result={"a": {"ms": 8.5}, "passes": True})
    assert [goal.is_met(ended.result) for goal in goals] == [False, True, False] and not ended.is_good
    rows = page([ended], "command", "today").splitlines()
    assert "| fast | 8.5 | missed |" in rows and "| right | yes | met |" in rows and "| absent |  | ran |" in rows
