"""AdamW and SGD for the class centres, which live outside the DeepSpeed engine, and the CUDA stream they run on.

Two modes for the centres that a step did not touch (at sample rate r most of them):

- `dense`: `torch.optim.AdamW` / `SGD` on the whole matrix with zero gradients for untouched centres, as in arcface_torch.
  Momentum and weight decay still move them. One step count for all centres.
- `row_sparse`: an untouched centre is neither read nor written. Each centre has its own step count for the bias
  correction, so its first update is a proper first Adam step. Decay is applied at each update only, so the decay per
  update is the same at every r. At r = 1 both modes agree.

Weight decay is decoupled for AdamW, w <- w (1 - lr wd); for SGD it is added to the gradient, as in torch.optim.SGD.

No temporary is larger than a chunk of centres. Every operation is elementwise by centre, so results do not depend on
chunks or on the number of ranks (bit for bit where d is a multiple of 16; otherwise the fused CPU kernel may round the
last elements of a chunk differently).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lvtrain.classifier.numerics import Kernel
from lvtrain.errors import UserError
from lvtrain.randomness import torch_bits

_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}

Name = Literal["adamw", "sgd"]
Mode = Literal["dense", "row_sparse"]
Moments = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of the optimizer of the class centres.

    Attributes:
        name: `adamw` or `sgd`.
        mode: `dense` or `row_sparse`, see the module.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: used unless a step is given another.
        momentum: of SGD.
        moments: `bfloat16` halves the optimizer's memory. Values are rounded stochastically, by a fixed function of seed,
            step and global element: runs repeat, whatever the number of ranks. Rounding to nearest would freeze an average
            that moves by 0.1% a step.

    Raises:
        UserError: an unknown name.
    """

    name: Name = "adamw"
    mode: Mode = "dense"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.9
    moments: Moments = "float32"

    def __post_init__(self) -> None:
        for name, known in (("name", Name), ("mode", Mode), ("moments", Moments)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise UserError(f"classifier.optimizer.{name}: {value!r} is not one of {', '.join(get_args(known))}")


ADAMW = OptimizerSettings()


class CentreOptimizer:
    """Updates `weight` [n_local, d] in place from gradients of all or of some of its rows.

    Args:
        weight: float32 [n_local, d]; a float64 weight (tests) has float64 moments.
        settings: what the optimizer does.
        kernel: `triton` computes row-sparse AdamW with float32 moments in one kernel; everything else is PyTorch.
        seed: for the rounding of bfloat16 moments.
        first_row: global class id of row 0, for the same rounding.
    """

    def __init__(
        self,
        weight: Tensor,
        settings: OptimizerSettings = ADAMW,
        *,
        kernel: Kernel = "torch",
        seed: int = 0,
        first_row: int = 0,
    ) -> None:
        self.weight = weight.detach()  # shares storage
        self.settings, self.seed, self.first_row = settings, seed, first_row
        dtype = torch.bfloat16 if settings.moments == "bfloat16" else weight.dtype
        adamw = settings.name == "adamw"
        keys = ("exp_avg", "exp_avg_sq") if adamw else ("momentum_buffer",) if settings.momentum else ()
        self._averages = {key: torch.zeros_like(self.weight, dtype=dtype) for key in keys}
        self._low_precision = dtype == torch.bfloat16 and bool(keys)
        self._one_kernel = kernel == "triton" and adamw and settings.mode == "row_sparse" and dtype == torch.float32
        steps = (len(weight), 1) if settings.mode == "row_sparse" else ()
        # float32, as torch.optim and its fused kernel keep them; exact to 2^24 steps
        self.steps = torch.zeros(steps, dtype=torch.float32, device=weight.device)
        self._chunk_rows = max(1, _CHUNK_ELEMENTS.get(weight.device.type, 1 << 20) // weight.shape[1])

    @torch.no_grad()
    def step(
        self, gradient: Tensor, row_indices: Tensor | None = None, *, lr: float, weight_decay: float | None = None
    ) -> None:
        """One update. It counts as one step: in `dense` mode of all rows, in `row_sparse` mode of the given ones.

        Args:
            gradient: [k, d].
            row_indices: int64 [k], the distinct local rows that `gradient` belongs to; None: all rows, in order.
            lr: learning rate of this step.
            weight_decay: None = the settings'.
        """
        if self.settings.mode == "dense":
            self.steps += 1
            if row_indices is not None:
                self._step_dense_scattered(gradient, row_indices, lr, weight_decay)
                return
        for first in range(0, len(gradient), self._chunk_rows):
            last = min(first + self._chunk_rows, len(gradient))
            rows = slice(first, last) if row_indices is None else row_indices[first:last]
            self._step_chunk(gradient[first:last], rows, lr=lr, weight_decay=weight_decay)

    def _step_chunk(
        self, gradient: Tensor, rows: slice | Tensor, *, lr: float, weight_decay: float | None = None
    ) -> None:
        """The update of some rows, each at most once a step. `rows`: a slice with start and stop, or int64 indices."""
        settings = self.settings
        gradient = gradient.to(self.weight.dtype)
        decay = settings.weight_decay if weight_decay is None else weight_decay
        if settings.mode == "row_sparse":
            self.steps[rows] += 1
        if self._one_kernel:
            self._in_one_kernel(gradient, rows, lr, decay)
            return
        if isinstance(rows, slice) and settings.mode == "dense" and not self._low_precision:
            weight, averages = self.weight[rows], [average[rows] for average in self._averages.values()]
            self._fused(weight, gradient, averages, lr, decay)
            return
        weight = self.weight[rows]
        averages = [average[rows].to(weight.dtype) for average in self._averages.values()]
        if settings.mode == "dense":
            self._fused(weight, gradient, averages, lr, decay)
        else:
            self._by_row(weight, gradient, averages, self.steps[rows].to(weight.dtype), lr, decay)
        self._store(rows, weight, averages)

    def _step_dense_scattered(
        self, gradient: Tensor, row_indices: Tensor, lr: float, weight_decay: float | None
    ) -> None:
        # gathered by chunk, without a [n, d] gradient or a host synchronisation: the gradient row of each weight row, or -1
        n = len(self.weight)
        taken = torch.full((n,), -1, dtype=torch.int64, device=self.weight.device)
        taken[row_indices] = torch.arange(len(row_indices), device=self.weight.device)
        for first in range(0, n, self._chunk_rows):
            last = min(first + self._chunk_rows, n)
            source = taken[first:last]
            if len(gradient):
                chunk = gradient[source.clamp_min(0)].masked_fill_((source < 0).unsqueeze(1), 0)
            else:
                chunk = torch.zeros_like(self.weight[first:last])
            self._step_chunk(chunk, slice(first, last), lr=lr, weight_decay=weight_decay)

    def _fused(self, weight: Tensor, gradient: Tensor, averages: list[Tensor], lr: float, decay: float) -> None:
        if self.settings.name == "adamw":
            torch._fused_adamw_(
                [weight], [gradient], [averages[0]], [averages[1]], [], [self.steps], lr=lr, beta1=self.settings.betas[0],
                beta2=self.settings.betas[1], weight_decay=decay, eps=self.settings.eps, amsgrad=False, maximize=False,
            )  # fmt: skip
        else:
            torch._fused_sgd_(
                [weight], [gradient], averages, lr=lr, momentum=self.settings.momentum, weight_decay=decay, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip

    def _by_row(
        self, weight: Tensor, gradient: Tensor, averages: list[Tensor], steps: Tensor, lr: float, decay: float
    ) -> None:
        """The same formulas with one step count per row, in place on gathered copies [k, d]; steps [k, 1]."""
        if self.settings.name == "sgd":
            direction = gradient.add(weight, alpha=decay)
            for average in averages:
                direction = average.mul_(self.settings.momentum).add_(direction)
            weight.sub_(direction, alpha=lr)
            return
        beta1, beta2 = self.settings.betas
        averages[0].lerp_(gradient, 1 - beta1)
        averages[1].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step_size, correction = self._bias_corrections(steps, lr)
        weight.mul_(1 - lr * decay).sub_(
            averages[0] * step_size / (averages[1].sqrt().div_(correction).add_(self.settings.eps))
        )

    def _bias_corrections(self, steps: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Step size lr / (1 - beta1^t) and correction sqrt(1 - beta2^t), computed in float64 because 1 - 0.999^t cancels."""
        steps, dtype = steps.to(torch.float64), self.weight.dtype
        return (lr / (1 - self.settings.betas[0] ** steps)).to(dtype), (1 - self.settings.betas[1] ** steps).sqrt().to(
            dtype
        )

    def _in_one_kernel(self, gradient: Tensor, rows: slice | Tensor, lr: float, decay: float) -> None:
        from lvtrain.classifier.optimizer_triton import adamw_rows

        index = torch.arange(rows.start, rows.stop, device=gradient.device) if isinstance(rows, slice) else rows
        step_size, correction = self._bias_corrections(self.steps[index].squeeze(1), lr)
        averages = self._averages["exp_avg"], self._averages["exp_avg_sq"]
        adamw_rows(
            self.weight, *averages, gradient, index, step_size, correction,
            lr=lr, weight_decay=decay, betas=self.settings.betas, eps=self.settings.eps,
        )  # fmt: skip

    def _store(self, rows: slice | Tensor, weight: Tensor, averages: list[Tensor]) -> None:
        self.weight[rows] = weight
        for key, average in zip(self._averages, averages):
            self._averages[key][rows] = self._rounded(average, rows, key) if self._low_precision else average

    def _rounded(self, values: Tensor, rows: slice | Tensor, key: str) -> Tensor:
        """Stochastic rounding to bfloat16, by 16 bits hashed from (seed, average, step, global row, column)."""
        index = torch.arange(rows.start, rows.stop, device=values.device) if isinstance(rows, slice) else rows
        steps = self.steps[rows] if self.settings.mode == "row_sparse" else self.steps.expand(len(index), 1)
        classes = (index + self.first_row).unsqueeze(1)
        dim = values.shape[1]
        quarter = torch.arange(-(-dim // 4), device=values.device)
        words = torch_bits(self.seed, f"moment-rounding/{key}", steps.to(torch.int64), classes, quarter)
        noise = torch.stack([(words >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], dim=2).flatten(1)[:, :dim]
        raised = values.to(torch.float32).contiguous().view(torch.int32) + noise.to(torch.int32)
        return (raised & -65536).view(torch.float32).to(torch.bfloat16)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; references, not copies. Scalars are the same on every rank.

        AdamW has `exp_avg` and `exp_avg_sq` [n_local, d]. SGD has `momentum_buffer` [n_local, d], unless momentum is 0.
        `dense` adds `step` (scalar), `row_sparse` adds `row_step` [n_local, 1].
        """
        return {**self._averages, "row_step" if self.settings.mode == "row_sparse" else "step": self.steps}


class SideStream:
    """A second CUDA stream, on which the centres are updated while the backbone computes.

    On other devices the work is done at once. Between `run` and `join` nothing else may write what the work reads, or
    touch what it writes.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: tuple[Any, ...] | None = None

    def follow(self) -> None:
        """Work that is run from now on begins after everything that is queued on the current stream so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def run(self, work: Callable[[], None], *reads: Any) -> None:
        """Runs `work` on the side stream.

        `reads` are kept alive until `join`: the caching allocator would otherwise reuse their memory on the main stream
        while the side stream still reads it.
        """
        self.join()
        if self._stream is None:
            work()
            return
        with torch.cuda.stream(self._stream):
            work()
        self._held = reads

    def join(self) -> None:
        """What is queued on the current stream from now on begins after the work. The host does not wait."""
        if self._stream is not None and self._held is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._held = None
