"""What one step asks of the host and of the GPU's memory at full size: rank 0 of 64 on tests/fakecuda's device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakecuda.device import FakeDevice
from tests.fakecuda.step import Case, measure

pytestmark = pytest.mark.fakecuda


def test_vit_l_on_64_gpus(fake_device: FakeDevice, tmp_path: Path) -> None:
    """PCO's refinement, both anchors over all classes, batch 24,576. The only wait is for whether the step was finite.

    Without cuDNN, 384 of forward's launches are the patch convolution's, one for each image.
    """
    found = measure(fake_device, Case("vit_l", 64, "refinement"), tmp_path)
    parts = found.parts
    assert {name: part["waits"] for name, part in parts.items() if part["waits"]} == {"update": 1}
    assert not any(part["pageable"] or part["mallocs"] for part in parts.values())
    launches = {"forward": 912, "loss": 900, "backward": 1440, "update": 27, "end": 73}
    assert all(parts[name]["launches"] <= 1.05 * count for name, count in launches.items()), parts
    assert all(parts[name]["collectives"] <= 3 for name in ("forward", "loss", "backward", "update")), parts
    assert 25e9 < max(found.peaks.values()) < 31e9
