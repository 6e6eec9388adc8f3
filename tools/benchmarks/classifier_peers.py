"""Other projects' classifiers, timed on the same shape: arcface_torch's PartialFC_V2, and Liger's tensor-parallel loss."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lvtrain.errors import UserError
from tools.benchmarks.apart import Step
from tools.benchmarks.classifier_variants import Problem

_LIGER = "liger_kernel.ops.fused_linear_scaled_cross_entropy"


def check_peer(folder: str) -> None:
    """Checks that the peer's folder has PartialFC_V2. An empty `folder` means no peer.

    Raises:
        UserError: it has not.
    """
    if folder and not Path(folder, "partial_fc_v2.py").exists():
        raise UserError(
            f"--peer {folder}: no partial_fc_v2.py there; give the recognition/arcface_torch folder of an insightface checkout"
        )


def partial_fc(folder: Path, shape: Problem) -> Step:
    """PartialFC_V2 of an arcface_torch checkout. On a CPU, `.cuda()` is replaced by one that does nothing."""
    x, weight = shape.x, shape.weight
    check_peer(str(folder))
    modules: dict[str, types.ModuleType] = {}
    for name in ("partial_fc_v2", "losses"):
        spec = importlib.util.spec_from_file_location(f"peer_{name}", folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    if not x.is_cuda:
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    _group(x)
    module = modules["partial_fc_v2"].PartialFC_V2(
        modules["losses"].CosFace(64.0, 0.4), x.shape[1], dist.get_world_size(), shape.rate
    )
    module.num_local, module.num_sample, module.weight = len(weight), int(shape.rate * len(weight)), weight
    module.class_start = shape.rows[0]

    def step() -> Any:
        x.grad = weight.grad = None
        loss = module(x, shape.labels.clone())
        loss.backward()
        weight.grad = None
        return loss

    return step


def why_no_liger(shape: Problem) -> str:
    """Why Liger cannot be timed here; empty: it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if not shape.x.is_cuda:
        return "its tensor-parallel loss needs CUDA tensors"
    if importlib.util.find_spec(_LIGER) is None:
        return "this liger-kernel has no fused_linear_scaled_cross_entropy; 0.8.5 has"
    return "it has no sampled classes" if shape.rate < 1.0 else ""


def liger(shape: Problem) -> Step:
    """`LigerFusedLinearScaledCrossEntropyTPFunction` of liger-kernel 0.8.5 on unit vectors in bfloat16.

    It has no margin. With the package `liger-cute-kernels` and NVSHMEM its kernels run on Hopper and Blackwell GPUs;
    without, it goes over 512 samples at a time with PyTorch's operations. The temperature is 1 / s.
    """
    loss_of = importlib.import_module(_LIGER).LigerFusedLinearScaledCrossEntropyTPFunction.apply
    x, weight = shape.x, shape.weight
    _group(x)
    labels = shape.all_labels.to(weight.device)  # every rank has the embeddings of all ranks, as after our gather

    def step() -> Any:
        x.grad = weight.grad = None
        unit = F.normalize(shape.all_x.detach().requires_grad_()).bfloat16()
        loss = loss_of(unit, F.normalize(weight).bfloat16(), labels, dist.group.WORLD, 1 / 64.0).mean()
        loss.backward()
        weight.grad = None
        return loss

    return step


def _group(x: torch.Tensor) -> None:
    if not dist.is_initialized():
        dist.init_process_group("nccl" if x.is_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
