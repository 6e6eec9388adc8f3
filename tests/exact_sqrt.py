"""Runs a script with square roots that are the same bits on every processor: `python tests/exact_sqrt.py SCRIPT ARGUMENTS`.

On x86 torch takes the roots of float32 from MKL. MKL starts from the processor's own approximation (the instruction
rsqrtps), so about one root in five may differ in its last bit from another processor's. NumPy's roots are correctly
rounded.
"""

from __future__ import annotations

import runpy
import sys

import numpy as np
import torch


def exact_sqrt(values: torch.Tensor) -> torch.Tensor:
    """The roots of a tensor in float32 or float64 on the CPU."""
    return torch.from_numpy(np.asarray(np.sqrt(values.numpy())))


if __name__ == "__main__":
    library = torch.library.Library("aten", "IMPL")
    library.impl("sqrt", exact_sqrt, "CPU")
    sys.argv = sys.argv[1:]
    sys.path[0] = ""
    runpy.run_path(sys.argv[0], run_name="__main__")
