"""The planner's memory against what a step of rank 0 allocated at full size (tools/results/cuda_host.md).

`tests/test_cuda_step.py` compares a small step as it is now.
"""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT
from tests.fakecuda.planned import planned_bytes
from tests.fakecuda.step import Case
from tests.fakecuda.table import cases, peak_gb

RECORDED = json.loads((ROOT / "tools" / "results" / "cuda_host.json").read_text())


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_the_plan_is_what_was_allocated(case: Case) -> None:
    states, peak = planned_bytes(case)
    assert states / 1e9 == pytest.approx(RECORDED[case.name]["states_gb"], rel=0.01)
    assert peak / 1e9 == pytest.approx(peak_gb(RECORDED[case.name]), rel=0.1)
