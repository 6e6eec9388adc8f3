"""AdamW and SGD for the class rows, which live outside the engine, one rank's share each.

Two rules for the rows a step did not touch (at sample rate r most of them):

- `dense`: the mathematics of `torch.optim.AdamW` / `SGD` on the whole matrix with zero gradients for untouched rows, as
  arcface_torch does: momentum and weight decay go on moving them. One step count for all rows.
- `row_sparse`: an untouched row is neither read nor written. Each row has its own step count, and bias correction uses
  it, so a row's first touch is a proper first Adam step; decay is applied at each touch only, without catching up, so
  that a row's decay per update is the same at every r. At r = 1 both modes agree.

Weight decay is decoupled (AdamW): w <- w (1 - lr wd); for SGD it is added to the gradient, as torch.optim.SGD does.

No temporary is larger than a chunk of rows. `begin_step` + `step_chunk` apply the update piece by piece, e.g. inside
backward so that no full gradient ever exists; `step` is both. Every operation is elementwise by row, so results do not
depend on chunking or on the split over ranks (bit for bit where d is a multiple of 16; otherwise the fused CPU kernel
may round the last elements of a chunk differently).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lvtrain.classifier.banks import load_into
from lvtrain.errors import UserError
from lvtrain.randomness import torch_bits

_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


class RowOptimizer:
    """Updates `weight` [n_local, d] in place from gradients of all or of some of its rows.

    moments: "bfloat16" halves the optimizer's memory; values are rounded stochastically (a fixed function of seed, step
    and global element, so runs repeat and do not depend on the split), because rounding to nearest would freeze an
    average that moves by 0.1% a step.
    kernel: "triton": row-sparse AdamW with float32 moments in one kernel (CUDA); elsewhere the same formulas in PyTorch.
    first_row: the global class id of row 0, which the rounding needs. A float64 weight (tests) has float64 moments.
    Raises UserError for unknown names or modes.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        name: Literal["adamw", "sgd"] = "adamw",
        mode: Literal["dense", "row_sparse"] = "dense",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.9,
        moments: Literal["float32", "bfloat16"] = "float32",
        kernel: Literal["torch", "triton"] = "torch",
        seed: int = 0,
        first_row: int = 0,
    ) -> None:
        if (
            name not in ("adamw", "sgd")
            or mode not in ("dense", "row_sparse")
            or moments not in ("float32", "bfloat16")
            or kernel not in ("torch", "triton")
        ):
            known = "adamw or sgd, dense or row_sparse, float32 or bfloat16, torch or triton"
            raise UserError(f"row optimizer {name!r} / {mode!r} / {moments!r} / {kernel!r}: there are {known}")
        if kernel == "triton" and (name != "adamw" or mode != "row_sparse" or moments != "float32"):
            raise UserError("row optimizer: kernel triton is for adamw, row_sparse, float32 moments; set kernel: torch")
        self.weight = weight.detach()  # shares storage
        self.name, self.mode, self.betas, self.eps = name, mode, betas, eps
        self.kernel, self.weight_decay, self.momentum, self.seed, self.first_row = (
            kernel,
            weight_decay,
            momentum,
            seed,
            first_row,
        )
        dtype = torch.bfloat16 if moments == "bfloat16" else weight.dtype
        keys = ("exp_avg", "exp_avg_sq") if name == "adamw" else ("momentum_buffer",) if momentum else ()
        self._averages = {key: torch.zeros_like(self.weight, dtype=dtype) for key in keys}
        self._low_precision = dtype == torch.bfloat16 and bool(keys)
        steps = (len(weight), 1) if mode == "row_sparse" else ()
        # float32, as torch.optim and its fused kernel keep them; exact to 2^24 steps
        self.steps = torch.zeros(steps, dtype=torch.float32, device=weight.device)
        self._chunk_rows = max(1, _CHUNK_ELEMENTS.get(weight.device.type, 1 << 20) // weight.shape[1])

    @torch.no_grad()
    def step(
        self, gradient: Tensor, row_indices: Tensor | None = None, *, lr: float, weight_decay: float | None = None
    ) -> None:
        """One update. gradient [k, d]; row_indices [k] int64 unique local rows it belongs to, or None when k = n_local,
        in order.

        Every call counts as one step: in dense mode all rows take it, in row_sparse mode the given ones.
        """
        self.begin_step()
        if row_indices is not None and self.mode == "dense":
            self._step_dense_scattered(gradient, row_indices, lr, weight_decay)
            return
        for first in range(0, len(gradient), self._chunk_rows):
            last = min(first + self._chunk_rows, len(gradient))
            rows = slice(first, last) if row_indices is None else row_indices[first:last]
            self.step_chunk(gradient[first:last], rows, lr=lr, weight_decay=weight_decay)

    def begin_step(self) -> None:
        """Counts a step; call once before the `step_chunk`s that make it up."""
        if self.mode == "dense":
            self.steps += 1

    @torch.no_grad()
    def step_chunk(
        self, gradient: Tensor, rows: slice | Tensor, *, lr: float, weight_decay: float | None = None
    ) -> None:
        """The update of some rows, each row at most once between two `begin_step`s.

        rows: a slice with plain start and stop, or int64 local indices. In dense mode the chunks of a step must cover
        every row (the caller passes zeros where there is no gradient), or untouched rows would miss their decay.
        """
        gradient = gradient.to(self.weight.dtype)
        decay = self.weight_decay if weight_decay is None else weight_decay
        if self.mode == "row_sparse":
            self.steps[rows] += 1
        if self.kernel == "triton":
            self._in_one_kernel(gradient, rows, lr, decay)
            return
        if isinstance(rows, slice) and self.mode == "dense" and not self._low_precision:
            weight, averages = self.weight[rows], [average[rows] for average in self._averages.values()]
            self._fused(weight, gradient, averages, lr, decay)
            return
        weight = self.weight[rows]
        averages = [average[rows].to(weight.dtype) for average in self._averages.values()]
        if self.mode == "dense":
            self._fused(weight, gradient, averages, lr, decay)
        else:
            self._by_row(weight, gradient, averages, self.steps[rows].to(weight.dtype), lr, decay)
        self._store(rows, weight, averages)

    def _step_dense_scattered(
        self, gradient: Tensor, row_indices: Tensor, lr: float, weight_decay: float | None
    ) -> None:
        # which gradient row each weight row takes, if any: gathered by chunk, without a [n, d] gradient or a host sync
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
            self.step_chunk(chunk, slice(first, last), lr=lr, weight_decay=weight_decay)

    def _fused(self, weight: Tensor, gradient: Tensor, averages: list[Tensor], lr: float, decay: float) -> None:
        if self.name == "adamw":
            torch._fused_adamw_(
                [weight], [gradient], [averages[0]], [averages[1]], [], [self.steps], lr=lr, beta1=self.betas[0],
                beta2=self.betas[1], weight_decay=decay, eps=self.eps, amsgrad=False, maximize=False,
            )  # fmt: skip
        else:
            torch._fused_sgd_(
                [weight], [gradient], averages, lr=lr, momentum=self.momentum, weight_decay=decay, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip

    def _by_row(
        self, weight: Tensor, gradient: Tensor, averages: list[Tensor], steps: Tensor, lr: float, decay: float
    ) -> None:
        """The same formulas with one step count per row, in place on gathered copies [k, d]; steps [k, 1]."""
        if self.name == "sgd":
            direction = gradient.add(weight, alpha=decay)
            for average in averages:
                direction = average.mul_(self.momentum).add_(direction)
            weight.sub_(direction, alpha=lr)
            return
        beta1, beta2 = self.betas
        averages[0].lerp_(gradient, 1 - beta1)
        averages[1].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step_size, correction = self._bias_corrections(steps, lr)
        weight.mul_(1 - lr * decay).sub_(averages[0] * step_size / (averages[1].sqrt().div_(correction).add_(self.eps)))

    def _bias_corrections(self, steps: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """lr / (1 - beta1^t) and sqrt(1 - beta2^t), computed in float64 because 1 - 0.999^t cancels."""
        steps, dtype = steps.to(torch.float64), self.weight.dtype
        return (lr / (1 - self.betas[0] ** steps)).to(dtype), (1 - self.betas[1] ** steps).sqrt().to(dtype)

    def _in_one_kernel(self, gradient: Tensor, rows: slice | Tensor, lr: float, decay: float) -> None:
        from lvtrain.classifier.optimizer_triton import adamw_rows

        index = torch.arange(rows.start, rows.stop, device=gradient.device) if isinstance(rows, slice) else rows
        step_size, correction = self._bias_corrections(self.steps[index].squeeze(1), lr)
        averages = self._averages["exp_avg"], self._averages["exp_avg_sq"]
        adamw_rows(
            self.weight, *averages, gradient, index, step_size, correction,
            lr=lr, weight_decay=decay, betas=self.betas, eps=self.eps,
        )  # fmt: skip

    def _store(self, rows: slice | Tensor, weight: Tensor, averages: list[Tensor]) -> None:
        self.weight[rows] = weight
        for key, average in zip(self._averages, averages):
            self._averages[key][rows] = self._rounded(average, rows, key) if self._low_precision else average

    def _rounded(self, values: Tensor, rows: slice | Tensor, key: str) -> Tensor:
        """Stochastic rounding to bfloat16, by 16 bits hashed from (seed, average, step, global row, column)."""
        index = torch.arange(rows.start, rows.stop, device=values.device) if isinstance(rows, slice) else rows
        steps = self.steps[rows] if self.mode == "row_sparse" else self.steps.expand(len(index), 1)
        classes = (index + self.first_row).unsqueeze(1)
        dim = values.shape[1]
        quarter = torch.arange(-(-dim // 4), device=values.device)
        words = torch_bits(self.seed, f"moment-rounding/{key}", steps.to(torch.int64), classes, quarter)
        noise = torch.stack([(words >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], dim=2).flatten(1)[:, :dim]
        raised = values.to(torch.float32).contiguous().view(torch.int32) + noise.to(torch.int32)
        return (raised & -65536).view(torch.float32).to(torch.bfloat16)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; references, not copies. Tensors with a dim 0 are per local row; a 0-dim tensor
        is replicated.

        adamw: `exp_avg`, `exp_avg_sq` [n_local, d]; sgd: `momentum_buffer` [n_local, d] unless momentum is 0; `step` (dense, scalar) or
        `row_step` [n_local, 1].
        """
        return {**self._averages, "row_step" if self.mode == "row_sparse" else "step": self.steps}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave (this rank's rows of it); raises UserError when names or shapes differ."""
        load_into(self.state(), state, what="row optimizer")
