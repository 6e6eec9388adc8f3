"""`kernel: auto`: the Triton kernels' self-test passes, notices a wrong kernel, and decides. By Triton's interpreter on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the import below

pytest.importorskip("triton")

from lvtrain.classifier import logsumexp_triton, optimizer_triton
from lvtrain.classifier.kernel import choose_kernel, failure, planned_kernel
from tests.fakecuda.device import FakeDevice

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
self_test = failure.__wrapped__  # without its memory


def test_the_kernels_pass() -> None:
    assert self_test(DEVICE) is None


def spoilt(kernel: Callable[..., Any], output: Callable[[tuple[Any, ...]], torch.Tensor]) -> Callable[..., Any]:
    """The kernel, and then one number of its output changed by a thousandth of the largest."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = kernel(*arguments, **options)
        numbers = output(arguments)
        numbers.view(-1)[0].add_(
            numbers.abs().max() * 0.02 if numbers.dtype != torch.float32 else numbers.abs().max() * 1e-3
        )
        return found

    return wrong


@pytest.mark.parametrize(
    ("module", "name", "output"),
    [
        (logsumexp_triton, "exponentials", lambda given: given[4]),
        (logsumexp_triton, "exponentials", lambda given: given[1]),
        (logsumexp_triton, "coefficients", lambda given: given[1]),
        (logsumexp_triton, "unit_rows", lambda given: given[1]),
        (logsumexp_triton, "row_gradients", lambda given: given[3]),
        (optimizer_triton, "adamw_rows", lambda given: given[0]),
    ],
)
def test_a_wrong_number_of_any_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, output: Callable[[tuple[Any, ...]], torch.Tensor]
) -> None:
    monkeypatch.setattr(module, name, spoilt(getattr(module, name), output))
    assert self_test(DEVICE) is not None


def test_a_kernel_that_cannot_run_is_a_failure_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no C compiler\nsecond line")

    monkeypatch.setattr(logsumexp_triton, "unit_rows", broken)
    assert self_test(DEVICE) == "RuntimeError: no C compiler"


def test_what_auto_means_without_a_gpu() -> None:
    assert choose_kernel("auto", torch.device("cpu")) == "torch"
    assert planned_kernel("auto") == "triton" and planned_kernel("torch") == "torch"


@pytest.mark.fakecuda
def test_a_device_that_computes_nothing_gets_the_torch_path(fake_device: FakeDevice, tmp_path: Path) -> None:
    """Every kernel is compiled and launched; then nothing proves that they are right."""
    ended = fake_device.call(f"{__name__}:chosen_on_the_device", folder=tmp_path)
    assert ended.code == 0, ended.output
    assert ended.value[0] == "torch" and "torch path gives 0" in ended.value[1]
    launched = {call.text.split()[0] for call in ended.trace() if call.kind == "launch"}
    assert {"_exponentials_kernel", "_coefficients_kernel", "_unit_rows_kernel", "_row_gradients_kernel"} <= launched


def chosen_on_the_device() -> tuple[str, str | None]:
    device = torch.device("cuda", 0)
    return choose_kernel("auto", device), failure(device)
