"""The classifier in every precision and kernel on one shape, its matmuls alone, and the loss with stored logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lvtrain.classifier import Anchor, Numerics, ShardedClassifier, class_range
from lvtrain.classifier.margins import CosFace
from lvtrain.classifier.numerics import chunk_size, formats, matmul_precision
from tools.benchmarks.apart import Step

_ALL = 1e6  # MB: keep every exponential


@dataclass
class Problem:
    """One shape.

    Attributes:
        x: embeddings of this rank.
        all_x: embeddings of all ranks.
        labels: of this rank.
        all_labels: of all ranks.
        weight: class centres of this rank.
        classes: over all ranks.
        rows: this rank's range of classes.
        rate: share of the classes that take part.
    """

    x: torch.Tensor
    all_x: torch.Tensor
    labels: torch.Tensor
    all_labels: torch.Tensor
    weight: torch.nn.Parameter
    classes: int
    rows: tuple[int, int]
    rate: float

    @property
    def taking_part(self) -> int:
        return round(len(self.weight) * self.rate)


def problem(batch: int, classes: int, rate: float, weight: torch.nn.Parameter) -> Problem:
    """A shape with `batch` samples over all ranks. `weight` holds this rank's centres of `classes`."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, weight.shape[1], generator=generator).to(weight.device)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    mine = slice(batch * rank // ranks, batch * (rank + 1) // ranks)
    rows = class_range(classes, rank, ranks)
    return Problem(
        x[mine].clone().requires_grad_(), x, labels[mine].to(weight.device), labels, weight, classes, rows, rate
    )


def variants(
    shape: Problem,
    precisions: list[str],
    kernels: list[str] | None = None,
    chunk: int = 0,
    materialised: bool = False,
    two_anchors: bool = False,
    kept: bool = False,
) -> dict[str, Step]:
    """Steps by name: "4 matmuls P", "3 matmuls P", "lvtrain P [kernel] [kept] [two anchors]", "materialised"."""
    steps: dict[str, Step] = {}
    for precision in precisions:
        for count in (4, 3):
            steps[f"{count} matmuls {precision}"] = _matmuls(shape, precision, chunk, recompute=count == 4)
        for keep in ["", " kept"] if kept else [""]:
            for kernel in kernels or ["torch"]:
                name = f"lvtrain {precision}" + ("" if kernel == "torch" else f" {kernel}") + keep
                steps[name] = _ours(shape, precision, kernel, chunk, _ALL if keep else None, two=False)
                if two_anchors and not keep:
                    steps[name + " two anchors"] = _ours(shape, precision, kernel, chunk, None, two=True)
    if materialised and shape.rate == 1.0:
        steps["materialised"] = _materialised(shape)
    return steps


def _ours(shape: Problem, precision: Any, kernel: Any, chunk: int, keep_mb: float | None, *, two: bool) -> Step:
    x, weight = shape.x, shape.weight
    numerics = Numerics(precision, kernel, chunk or None)
    if keep_mb is not None:
        numerics = replace(numerics, keep_mb=keep_mb)
    head = ShardedClassifier(1, x.shape[1], margin=CosFace(), numerics=numerics, device=x.device)
    # one weight for all variants, because several would not fit
    head.num_classes, head.rows, head.weight = shape.classes, shape.rows, weight
    head.enter_phase(sample_rate=shape.rate)
    second = [Anchor(F.normalize(weight.detach()), CosFace(), is_unit=True)] if two else []

    def step() -> Any:
        x.grad = None
        head.begin_step(0, shape.all_labels)
        loss = head(x, shape.labels, step=0, anchors=second).loss
        loss.backward()
        head.discard_step()
        return loss

    return step


def _matmuls(shape: Problem, precision: str, chunk: int, *, recompute: bool) -> Step:
    """A lower bound: only the four matmuls (three without `recompute`), in the precision's number formats and chunks.

    The centres' gradient is written where the classifier writes it. 16-bit factors are two chunks that stay in cache.
    Nothing is normalised, rounded or exponentiated.
    """
    x, weight, count = shape.all_x, shape.weight.detach(), shape.taking_part
    size = chunk_size(len(x), x.shape[1], count, chunk or None, x.device)
    kind = formats(precision, weight.dtype, x.device)
    unit, factor = (weight.dtype, weight.dtype) if kind.emulated else (kind.unit, kind.factor)
    left, right = F.normalize(x).to(unit), F.normalize(x).to(factor)
    unit_rows = None if unit == weight.dtype else weight[:size].to(unit)
    factor_rows = None if factor == weight.dtype else weight[:size].to(factor)
    e = None if factor == weight.dtype else torch.ones(len(x) * size, dtype=factor, device=x.device)
    wide: dict[str, Any] = {"out_dtype": torch.float32} if x.is_cuda and factor != weight.dtype else {}

    def step() -> Any:
        gradient = weight.new_empty(count, weight.shape[1])
        total = torch.zeros_like(x)
        buffer = x.new_empty(len(x) * size)
        with matmul_precision(precision, x.device):
            for backward in (False, True):
                for start in range(0, count, size):
                    stop = min(start + size, count)
                    logits = buffer[: len(x) * (stop - start)].view(len(x), -1)
                    if recompute or not backward:
                        rows = weight[start:stop] if unit_rows is None else unit_rows[: stop - start]
                        torch.mm(left, rows.t(), out=logits, **({} if unit_rows is None else wide))
                    probability = logits if e is None else e[: logits.numel()].view_as(logits)
                    if not backward:
                        total.add_(
                            torch.mm(
                                probability,
                                weight[start:stop] if factor_rows is None else factor_rows[: stop - start],
                                **wide,
                            )
                        )
                    elif e is None or wide:
                        torch.mm(probability.t(), right, out=gradient[start:stop], **wide)
                    else:
                        torch.mm(probability.t(), right)
        return total

    return step


def _materialised(shape: Problem) -> Step:
    x, weight = shape.x, shape.weight

    def step() -> Any:
        x.grad = weight.grad = None
        cosine = F.linear(F.normalize(x), F.normalize(weight))
        loss = F.cross_entropy(
            64.0 * (cosine - 0.4 * F.one_hot(shape.labels, len(weight)).to(cosine.dtype)), shape.labels
        )
        loss.backward()
        weight.grad = None
        return loss

    return step
