"""How long a save stops training, how long until it is committed, and how long a resume takes, for ViT-L and millions of classes.

The state is that of PCO's second and third phase, all float32: weights and two Adam moments of the backbone, and for every
class its centre, two moments and its feature expectation. `scale` shrinks both. Times are measured at that scale, and then
scaled linearly to the bytes that a rank holds.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lvtrain.checkpoint.checkpoints import Checkpoints
from lvtrain.checkpoint.lease import hold
from lvtrain.checkpoint.state import Replicated, Rows, State
from lvtrain.distributed.world import World

VIT_L = 255_700_000
SMALL = {"scale": 0.002}


def run(
    classes: int = 2_059_906,
    dim: int = 512,
    backbone: int = VIT_L,
    scale: float = 0.05,
    folder: str = "",
    device: str = "cpu",
) -> dict[str, Any]:
    """Seconds on one process, and the arithmetic for 1, 8 and 64 ranks. `folder`: where to write; default: a temporary one."""
    rows, floats = int(classes * scale), int(backbone * scale)
    state: State = {f"classifier.{name}": Rows(torch.ones(rows, dim, device=device), 0, rows) for name in "wmve"}
    # the engine gives host copies; copying the backbone is timed here as its export
    parts = [torch.ones(floats, device=device) for _ in range(3)]
    world = World(0, 1, 0, torch.device(device))
    work = Path(tempfile.mkdtemp(dir=folder or None))
    try:
        result = _measure(work, world, state, parts)
    finally:
        shutil.rmtree(work)
    full = 4 * (classes * dim * 4 + 3 * backbone)
    per_byte = {name: result[name] / result["bytes"] for name in ("stall_seconds", "commit_seconds", "resume_seconds")}
    result["full_size_gb"] = round(full / 1e9, 1)
    result["by_arithmetic"] = {
        f"{ranks} ranks, each its own disk bandwidth": {
            name: round(rate * full / ranks, 2) for name, rate in per_byte.items()
        }
        for ranks in (1, 8, 64)
    }
    return {"scale": scale, "classes": rows, "dim": dim, "backbone_parameters": floats, "device": device} | result


def _measure(work: Path, world: World, state: State, parts: list[torch.Tensor]) -> dict[str, Any]:
    stalls, commits = [], []
    with hold(work, world) as lease, Checkpoints(work, world, run_id="r", fingerprint="f", lease=lease) as checkpoints:
        for step in (1, 2, 3):
            began = time.perf_counter()
            exported: State = {
                f"backbone.{i}": Replicated(part.to("cpu", copy=True), given=True) for i, part in enumerate(parts)
            }
            checkpoints.save(step, step, "one", state | exported, {})
            stalls.append(time.perf_counter() - began)
            checkpoints.wait()
            commits.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in next((work / "checkpoints").glob("step_*")).iterdir())
    with hold(work, world) as lease, Checkpoints(work, world, run_id="r", fingerprint="f", lease=lease) as checkpoints:
        began = time.perf_counter()
        found = checkpoints.newest()
        assert found is not None
        verified = time.perf_counter() - began
        reader = checkpoints.load(found)
        for name, saved in state.items():
            assert isinstance(saved, Rows)
            saved.tensor.copy_(reader.rows(name, 0, saved.total))
        for i, part in enumerate(parts):
            part.copy_(reader.replicated(f"backbone.{i}"))
        resume = time.perf_counter() - began
    return {
        "bytes": size,
        # the first save also allocates the snapshot's buffers
        "first_stall_seconds": round(stalls[0], 3),
        "stall_seconds": round(min(stalls[1:]), 3),
        "commit_seconds": round(min(commits[1:]), 3),
        "verify_seconds": round(verified, 3),
        "resume_seconds": round(resume, 3),
        "written_mb_per_second": round(size / 1e6 / min(commits[1:]), 0),
    }
