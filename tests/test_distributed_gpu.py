"""Which GPU is a rank's, and a node whose GPUs torch cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lvtrain.distributed.gpu import check_usable, device_index
from lvtrain.errors import UserError

# as the drivers write it, open and proprietary kernel module
VERSIONS = {
    "535.161.08": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 24 22:29:44 UTC 2024\nGCC version: 12\n",
    "550.54": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54  Release Build\n",
    "580.95.05": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@x)\n",
}


def node(root: Path, driver: str | None, gpus: int = 0) -> Path:
    if driver:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(VERSIONS[driver])
    (root / "dev").mkdir()
    for number in range(gpus):
        (root / f"dev/nvidia{number}").touch()
    return root


@pytest.mark.parametrize(
    ("driver", "gpus", "environment", "cuda", "named"),
    [
        ("535.161.08", 8, {}, "13.2", ["535.161.08", "13.2", "580"]),
        ("550.54", 1, {"CUDA_VISIBLE_DEVICES": "0"}, "13.0", ["550.54", "580"]),
        ("580.95.05", 0, {}, "13.2", ["580.95.05", "--gpus all", "--nv"]),
        ("580.95.05", 2, {}, "13.2", ["580.95.05", "torch says"]),
        ("580.95.05", 2, {}, None, ["built without CUDA"]),
        (None, 0, {"SLURM_GPUS_ON_NODE": "8"}, "13.2", ["SLURM_GPUS_ON_NODE=8", "580"]),
        (None, 0, {"SLURM_STEP_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"}, "12.6", ["SLURM_STEP_GPUS=0,1", "525.60"]),
    ],
)
def test_gpus_that_torch_cannot_use_are_refused(
    driver: str | None,
    gpus: int,
    environment: dict[str, str],
    cuda: str | None,
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    root = node(tmp_path, driver, gpus)
    with pytest.raises(UserError) as refused:
        check_usable(environment, root)
    assert all(name in str(refused.value) for name in [*named, "CUDA_VISIBLE_DEVICES"])
    check_usable(environment | {"CUDA_VISIBLE_DEVICES": ""}, root)


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_GPUS_ON_NODE": "0"}, {"CUDA_VISIBLE_DEVICES": "0,1", "RANK": "0"}],  # deepspeed sets the last on a CPU
)
def test_a_node_without_gpus_trains_on_the_cpu(environment: dict[str, str], tmp_path: Path) -> None:
    check_usable(environment, node(tmp_path, None))


@pytest.mark.parametrize(
    ("local_rank", "visible", "shown", "index"),
    [
        (3, 8, None, 3),
        (0, 1, None, 0),
        (1, 2, "4,5", 1),
        (3, 1, "0", 0),
        (3, 1, "GPU-1f2e", 0),
        (1, 1, None, None),
        (2, 2, "4,5", None),
    ],
)
def test_a_ranks_gpu_is_its_number_or_the_only_one_it_is_shown(
    local_rank: int, visible: int, shown: str | None, index: int | None
) -> None:
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    if index is not None:
        assert device_index(5, local_rank, visible, environment) == index
        return
    with pytest.raises(UserError, match=f"{local_rank} .*{visible} GPUs"):
        device_index(5, local_rank, visible, environment)
