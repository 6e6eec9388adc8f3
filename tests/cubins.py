"""Compiles the classifier's Triton kernels for a GPU that is not here, with Triton's own ptxas: registers, spills, shared memory.

python -m tests.cubins 80 90 100 120
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined, so before the imports below

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from lvtrain.classifier import logsumexp_triton, optimizer_triton

_FLOATS, _IDS = "*fp32", "*i64"
# arguments that are plain numbers; everything else points to float32, but for these
_NUMBERS = {name: "fp32" for name in ("ceiling", "gain", "eps", "shrink", "add1", "keep2", "add2")}
_NUMBERS |= {name: "i32" for name in ("width", "logits_stride", "out_stride", "dim")}
_POINTERS = {"column": _IDS, "rows": _IDS}


def cases() -> dict[str, tuple[Any, str, dict[str, Any], bool]]:
    """By name: kernel, format of `out`, constants, and whether widths are multiples of 16 (loads of 128 bits)."""
    found: dict[str, tuple[Any, str, dict[str, Any], bool]] = {}
    for out in ("fp16", "bf16", "fp32"):
        for filtered in (False, True):
            for aligned in (True, False) if out == "fp16" else (True,):
                name = f"{out}{' filtered' * filtered}{' ragged' * (not aligned)}"
                # float16 always follows the running maximum; the others do so for large scales
                passes = {"running": out == "fp16", "filtered": filtered, "block": 2048}
                found[f"exponentials {name}"] = (logsumexp_triton._exponentials_kernel, out, passes, aligned)
                passes = {"filtered": filtered, "block": 1024}
                found[f"coefficients {name}"] = (logsumexp_triton._coefficients_kernel, out, passes, aligned)
        found[f"unit_rows {out}"] = (logsumexp_triton._unit_rows_kernel, out, {"block": 512}, True)
    for unit in (False, True):
        constants = {"unit": unit, "block": 512}
        found[f"row_gradients unit={unit}"] = (logsumexp_triton._row_gradients_kernel, "fp32", constants, True)
    found["adamw_rows"] = (optimizer_triton._adamw_rows, "fp32", {"BLOCK": 512}, True)
    return found


def compiled(capability: int) -> dict[str, dict[str, int]]:
    """Of each case for `sm_<capability>`: registers a thread, bytes spilled, bytes of shared memory, bytes of the cubin."""
    return {name: _compiled(capability, *case) for name, case in cases().items()}


def _compiled(capability: int, kernel: Any, out: str, constants: dict[str, Any], aligned: bool) -> dict[str, int]:
    signature, divisible = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _NUMBERS:
            signature[name] = _NUMBERS[name]
        else:
            signature[name] = f"*{out}" if name == "out" else _POINTERS.get(name, _FLOATS)
        if signature[name].startswith("*") or (signature[name] == "i32" and aligned):
            divisible[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=places, attrs=divisible)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(built.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", built.asm["ptx"])
        assert target
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={target[1]}",
            str(ptx),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "shared": built.metadata.shared,
        "cubin": len(built.asm["cubin"]),
    }


if __name__ == "__main__":
    print(json.dumps({capability: compiled(int(capability)) for capability in sys.argv[1:]}))
