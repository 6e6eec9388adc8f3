"""Collectives with a gradient: rows of all ranks gathered, sums over ranks.

All of them work without an initialised process group (one rank) and then cost nothing. `group=None` is the default group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None


def group_size(group: Group = None) -> int:
    """Number of ranks of the group; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def group_rank(group: Group = None) -> int:
    """This process's rank in the group; 0 without a process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def gather_sizes(count: int, device: torch.device, group: Group = None) -> list[int]:
    """The number of rows each rank holds, as seen by all. One small all-gather and a host synchronisation."""
    if group_size(group) == 1:
        return [count]
    counts = torch.empty(group_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([count], dtype=torch.int64, device=device), group=group)
    return [int(c) for c in counts.tolist()]


def true_everywhere(flag: bool, device: torch.device, group: Group = None) -> bool:
    """Whether `flag` is true on every rank of the group. A small all-reduce and a host synchronisation."""
    if group_size(group) == 1:
        return flag
    vote = torch.tensor([int(flag)], device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=group)
    return bool(vote.item())


def all_gather_rows(x: torch.Tensor, sizes: Sequence[int], group: Group = None) -> torch.Tensor:
    """All ranks' rows, concatenated: `[sum(sizes), ...]`, without gradient. One all-gather, padded to the largest rank."""
    if len(sizes) == 1:
        return x
    x = x.contiguous()
    largest = max(sizes)
    if x.shape[0] < largest:
        x = torch.cat([x, x.new_zeros(largest - x.shape[0], *x.shape[1:])])
    gathered = x.new_empty(largest * len(sizes), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x, group=group)
    if min(sizes) == largest:
        return gathered
    return torch.cat([gathered[i * largest : i * largest + size] for i, size in enumerate(sizes)])


class PendingRows:
    """A reduce-scatter under way; `wait()` gives this rank's rows of the sum."""

    def __init__(self, rows: torch.Tensor, count: int, work: Any, keep: torch.Tensor | None) -> None:
        self._rows, self._count, self._work, self._keep = rows, count, work, keep

    def wait(self) -> torch.Tensor:
        if self._work is not None:
            self._work.wait()  # on CUDA this only orders the streams, the host does not wait
            self._work = self._keep = None
        return self._rows[: self._count]


def reduce_scatter_rows(x: torch.Tensor, sizes: Sequence[int], group: Group = None) -> PendingRows:
    """Starts the sum over ranks of `x` `[sum(sizes), ...]`, of which each rank keeps its own rows. One reduce-scatter."""
    if len(sizes) == 1:
        return PendingRows(x, x.shape[0], None, None)
    largest = max(sizes)
    if min(sizes) < largest:
        padded = x.new_zeros(largest * len(sizes), *x.shape[1:])
        start = 0
        for i, size in enumerate(sizes):
            padded[i * largest : i * largest + size] = x[start : start + size]
            start += size
        x = padded
    x = x.contiguous()
    rows = x.new_empty(largest, *x.shape[1:])
    work = dist.reduce_scatter_tensor(rows, x, group=group, async_op=True)
    return PendingRows(rows, sizes[group_rank(group)], work, x)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        sizes: Sequence[int],
        group: Group,
        gradient_scale: float,
        gathered: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.sizes, ctx.group, ctx.gradient_scale = sizes, group, gradient_scale
        if gathered is None:
            gathered = all_gather_rows(x, sizes, group)
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # type: ignore[override]
        rows = reduce_scatter_rows(gradient, ctx.sizes, ctx.group).wait()
        return (rows * ctx.gradient_scale if ctx.gradient_scale != 1.0 else rows), None, None, None, None


def gather_rows(
    x: torch.Tensor,
    group: Group = None,
    *,
    sizes: Sequence[int] | None = None,
    gradient_scale: float = 1.0,
    gathered: torch.Tensor | None = None,
) -> torch.Tensor:
    """All ranks' rows one below the other, in rank order, on every rank; differentiable.

    Forward: one all-gather of `x` `[b, ...]` to `[sum(sizes), ...]`. Backward: one reduce-scatter, so that a rank holds the SUM over ranks of
    the gradients for its own rows, times `gradient_scale`. Under an engine that averages parameter gradients over ranks (DeepSpeed, DDP) and a
    loss that is the mean over the gathered rows, the scale must be the number of ranks.

    `gathered`: all ranks' rows, where someone has gathered them already; forward then communicates nothing and only the gradient is routed.
    `sizes`: rows of each rank, where the caller knows them (`[b] * ranks` when equal); None asks the ranks, which costs a host synchronisation.
    """
    if group_size(group) == 1 and gradient_scale == 1.0:
        return x
    sizes = gather_sizes(x.shape[0], x.device, group) if sizes is None else list(sizes)
    return _GatherRows.apply(x, sizes, group, gradient_scale, gathered)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


def all_reduce_sum(x: torch.Tensor, group: Group = None) -> torch.Tensor:
    """The sum over ranks, on every rank. Not in place.

    Backward passes the gradient through without communication: it is meant for a loss that every rank computes identically from the sum, so that
    each rank's own copy already holds the whole derivative with respect to its own term.
    """
    return x if group_size(group) == 1 else _AllReduceSum.apply(x, group)
