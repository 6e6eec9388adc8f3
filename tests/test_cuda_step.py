"""What one step asks of the host and of the GPU's memory at full size, on tests/fakecuda's device.

The budgets are `tools/results/cuda_host.json`; its page is for people. `python -m tests.fakecuda.table` writes both.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fakecuda.device import FakeDevice
from tests.fakecuda.planned import planned_bytes
from tests.fakecuda.step import Case, Measured, measure
from tests.fakecuda.table import cases, row

pytestmark = pytest.mark.fakecuda

BUDGETS = json.loads((ROOT / "tools" / "results" / "cuda_host.json").read_text())
CASES = {case.name: case for case in cases()}
# one micro-batch of a rank, so that its backward pass is the one that sums
SMALL = Case(
    "small",
    64,
    "refinement_small_batch",
    changes=("backbone.name=vit_s", "data.num_classes=200000"),
    ds_config="zero1",
)
IN_CI = "vit_l, 64 GPUs, batch 24,576, triton"  # a minute each: the others run with -m slow


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != IN_CI)) for name in CASES])
def test_a_step_stays_within_its_budget(fake_device: FakeDevice, tmp_path: Path, name: str) -> None:
    found, budget = row(fake_device, CASES[name], tmp_path), BUDGETS[name]
    for part, allowed in budget["parts"].items():
        asked = found["parts"][part]
        for column in ("waits", "pageable", "mallocs", "collectives"):
            assert asked[column] <= allowed[column], (part, column)
        for column in ("launches", "products"):
            assert asked[column] <= 1.05 * allowed[column], (part, column)
        assert asked["peak_gb"] == pytest.approx(allowed["peak_gb"], rel=0.02, abs=0.02), part
    assert found["states_gb"] == pytest.approx(budget["states_gb"], rel=0.01, abs=0.01)


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_only_for_the_verdict(name: str) -> None:
    """Whether the step was finite, in `update`. Nothing is copied from pageable memory."""
    for part, allowed in BUDGETS[name]["parts"].items():
        assert allowed["waits"] == (part == "update"), part
        assert allowed["pageable"] == 0, part


SMALL_COMPILED = replace(
    SMALL, changes=(*SMALL.changes, "backbone.overrides={depth: 2, drop_path: 0}", "deterministic=true"), compiled=True
)


@pytest.fixture(scope="module")
def small(fake_device: FakeDevice, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(fake_device, SMALL, tmp_path_factory.mktemp("small"))


def test_the_plan_is_what_is_allocated(small: Measured) -> None:
    states, peak = planned_bytes(SMALL)
    assert states == pytest.approx(small.states, rel=0.01)
    assert peak == pytest.approx(max(small.peaks.values()), rel=0.1)


def test_gradients_are_summed_while_the_backward_pass_computes(small: Measured) -> None:
    _check_overlap(small, sums=2)


def test_a_compiled_backbone_gives_its_gradients_block_by_block(fake_device: FakeDevice, tmp_path: Path) -> None:
    found = measure(fake_device, SMALL_COMPILED, tmp_path)
    assert any(kind == "launch" for kind, _ in found.calls["forward"])
    _check_overlap(found, sums=1)


def test_a_call_that_was_given_up_answers_nobody(fake_device: FakeDevice, tmp_path: Path) -> None:
    def give_up(*arguments: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGUSR1, give_up)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    with pytest.raises(TimeoutError):
        fake_device.call("time:sleep", 600, folder=tmp_path)
    signal.signal(signal.SIGUSR1, before)
    assert fake_device.call("operator:add", 1, 2, folder=tmp_path).value == 3


def _check_overlap(found: Measured, *, sums: int) -> None:
    """On a stream of its own, while matrix products are still to come, and no call there waits."""
    calls = found.calls["backward"]
    products = [place for place, (kind, _) in enumerate(calls) if kind == "gemm"]
    summed = [place for place, (kind, _) in enumerate(calls) if kind == "nccl"]
    assert len([place for place in summed if place < products[-1]]) >= sums
    assert not {calls[place][1] for place in summed} & {calls[place][1] for place in products}
    assert "sync" not in {kind for kind, _ in calls}
