"""Shared fixtures: small generated data, made once a session, and what this machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fakecuda.device import FakeDevice

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidia0").exists():
    # read when a Triton kernel is defined, so before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests skip with a reason where there is no GPU; slow ones run only when asked for by marker."""
    import torch

    # Slurm's chains mostly wait: started first, they wait while other tests run
    items.sort(key=lambda item: "slurm" not in item.keywords)
    asked = config.getoption("-m")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine (run on one: pytest -m gpu)"))
        wanted = "slow" in asked or (item.get_closest_marker("reality") and "reality" in asked)
        if "slow" in item.keywords and not wanted:
            item.add_marker(pytest.mark.skip(reason="longer proof (run: pytest -m slow)"))


@pytest.fixture(scope="session")
def tiny_faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 generated identities x 10 images (`train/`), and 200 pairs of 12 unseen ones (`heldout.bin`)."""
    folder = tmp_path_factory.mktemp("faces")
    command = [
        sys.executable,
        str(ROOT / "tools" / "synth_faces.py"),
        str(folder),
        "--identities",
        "24",
        "--images",
        "10",
        "--heldout",
        "12",
        "--pairs",
        "200",
    ]
    subprocess.run([*command, "--seed", "1"], check=True, capture_output=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def fake_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDevice]:
    """An H200 whose kernels do nothing (tests/fakecuda), for tests of the host's half of the CUDA path."""
    from tests.fakecuda.build import Unsupported
    from tests.fakecuda.device import FakeDevice

    try:
        device = FakeDevice(tmp_path_factory.mktemp("fakecuda"))
    except Unsupported as reason:
        pytest.skip(str(reason))
    yield device
    device.close()
