"""What a process runs on: versions, hardware and launch, for `environment.json` and the comparison of ranks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lvtrain.distributed.world import World

_PACKAGES = (
    *("torch", "triton", "deepspeed", "timm", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    *("webdataset", "accelerate", "safetensors", "pydantic"),
)


def environment(world: World) -> dict[str, Any]:
    """Versions, hardware and launch of this start, as JSON."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "git": _git_commit(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "world_size": world.size,
        "device": str(world.device),
        "gpus": gpus,
        "cpus": os.cpu_count(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
