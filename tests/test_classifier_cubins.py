"""Every Triton kernel of the classifier, compiled for GPUs that are not here: nothing spills, registers and memory are few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton.backends.nvidia.compiler")
CAPABILITIES = ("80", "90", "100", "120")  # A100, H100 and H200, B200, RTX 50
# a thread; with 96, an SM still holds 5 blocks of 128 threads
REGISTERS = {"exponentials": 96, "coefficients": 48, "unit_rows": 24, "row_gradients": 32, "adamw_rows": 40}


def test_no_kernel_spills(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.cubins", *CAPABILITIES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert tuple(found) == CAPABILITIES
    for capability, kernels in found.items():
        assert len(kernels) == 22
        for name, used in kernels.items():
            assert used["spills"] == 0 and used["cubin"] > 1000, (capability, name, used)
            assert used["registers"] <= REGISTERS[name.split()[0]] and used["shared"] <= 64, (capability, name, used)
