"""Which GPU is this rank's, and why torch cannot use the GPUs of this node."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lvtrain.errors import UserError

# oldest Linux driver of each CUDA release (NVIDIA, "CUDA Compatibility", minor version compatibility)
OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580"}
_ASKED_FOR = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")


def check_usable(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Refuses to train on the CPU of a node whose GPUs torch cannot use. Call it where torch sees no GPU.

    An empty `CUDA_VISIBLE_DEVICES` says that the CPU is meant.

    Args:
        environment: of this process.
        root: where `/proc` and `/dev` are looked for.

    Raises:
        UserError: Slurm gave this rank GPUs, or there is an NVIDIA driver.
    """
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    driver = _driver(root)
    asked = next((name for name in _ASKED_FOR if environment.get(name, "0") not in ("", "0")), None)
    if asked is None and driver is None:
        return
    found = f"{asked}={environment[asked]}" if asked else f"NVIDIA driver {driver}"
    raise UserError(f"this node has GPUs ({found}) that torch cannot use: {_reason(driver, root)}; " + _CPU)


_CPU = "to train on the CPU, set CUDA_VISIBLE_DEVICES to nothing"


def _reason(driver: str | None, root: Path) -> str:
    built = torch.version.cuda
    if built is None:
        return f"torch {torch.__version__} is built without CUDA; install a build for CUDA"
    oldest = OLDEST_DRIVER.get(int(built.split(".")[0]), "?")
    needs = f"torch {torch.__version__} is built for CUDA {built} and needs NVIDIA driver {oldest} or newer"
    if driver is None:
        return f"{needs}, and no driver is loaded here; load it, or start the container with it (--gpus all, --nv)"
    if oldest != "?" and _numbers(driver) < _numbers(oldest):
        return f"{needs}, and this node has {driver}; update the driver, or install torch for an older CUDA"
    if not list((root / "dev").glob("nvidia[0-9]*")):
        return f"{needs}; the driver is {driver}, but no GPU is shown here; start the container with --gpus all or --nv"
    return f"{needs}; the driver is {driver}; torch says: {_torch_error()}"


def _torch_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "no device"


def _driver(root: Path) -> str | None:
    """The version of the loaded NVIDIA driver; a container shows it even where it shows no GPU."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+[.\d]*)", text)
    return match[1] if match else "of unknown version"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def device_index(rank: int, local_rank: int, visible: int, environment: Mapping[str, str] = os.environ) -> int:
    """Index of this rank's GPU among the `visible` ones.

    It is the rank's number on the node, or 0 if the launcher shows each rank only its own GPU.

    Raises:
        UserError: more ranks on this node than GPUs.
    """
    if local_rank < visible:
        return local_rank
    if sees_only_its_own(local_rank, visible, environment):
        return 0
    raise UserError(
        f"rank {rank} is number {local_rank} on its node and sees {visible} GPUs; start as many ranks a node as it has "
        "GPUs (Slurm: --ntasks-per-node and --gpus-per-node the same)"
    )


def sees_only_its_own(local_rank: int, visible: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher hides the node's other GPUs from this rank, as `srun --gpus-per-task=1` does.

    NCCL then cannot use the links between them (NVIDIA/nccl issue 1066), and training is slower.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return local_rank > 0 and visible == 1 and len(shown) == 1 and bool(shown[0])
