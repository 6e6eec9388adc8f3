"""The two passes over class chunks: readable PyTorch, any device, no `[B, C]` tensor.

Pass 1 (`forward_pass`) gives each sample's sum of exponentials over its negatives and, in the same sweep, the sum of the rows weighted by them
(the embedding gradient up to factors of `[B]`). Pass 2 (`weight_gradient_pass`) recomputes each chunk and hands out the gradient of its rows.
Four matmuls in all; the embedding gradient is complete before pass 2 begins.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lvtrain.errors import UserError

PRECISIONS = ("float32", "tf32", "half", "bfloat16")
_NORM_EPS = 1e-12  # as torch.nn.functional.normalize
_MAX_EXPONENT = {torch.float32: 80.0, torch.float64: 650.0}
_HALF_GAIN = 2.0**14  # keeps small probabilities out of float16's subnormals; a power of two, so it costs no accuracy


@dataclass(frozen=True)
class Classes:
    """The class rows one pass runs over, on this rank.

    `weight` [local, d] any norm; `indices` int64 [k] sorted local rows that take part, None = all; `scale` one number, or one per local row
    ([local]); `threshold` drops negatives with a larger cosine; `mask` bool [local], False = the class is no negative; `unit` = rows already
    have norm 1.
    """

    weight: torch.Tensor
    scale: float | torch.Tensor
    indices: torch.Tensor | None = None
    threshold: float | None = None
    mask: torch.Tensor | None = None
    unit: bool = False
    chunk: int | None = None
    precision: str = "float32"
    kernel: str = "torch"

    def __post_init__(self) -> None:
        if self.kernel not in ("torch", "triton"):
            raise UserError(f"classifier.kernel: {self.kernel!r} is not torch or triton")
        if self.precision not in PRECISIONS:
            raise UserError(f"classifier.precision: {self.precision!r} is not one of {', '.join(PRECISIONS)}")

    @property
    def fused(self) -> bool:
        """Whether the Triton kernels do the elementwise work: they know one scale, no mask, and float32."""
        return self.kernel == "triton" and self.weight.dtype == torch.float32 and self.mask is None and not isinstance(self.scale, torch.Tensor)

    @property
    def ceiling(self) -> float | None:
        """The largest logit of a negative that takes part, for one scale."""
        return None if self.threshold is None or isinstance(self.scale, torch.Tensor) else self.scale * self.threshold

    @property
    def count(self) -> int:
        return len(self.weight) if self.indices is None else len(self.indices)

    def positions(self, labels: torch.Tensor, start: int) -> torch.Tensor:
        """Where each global label stands among this rank's rows of the pass: int64 [B], -1 = not here."""
        local = labels - start
        here = (labels >= 0) & (local >= 0) & (local < len(self.weight))
        if self.indices is None:
            return torch.where(here, local, -1)
        if self.count == 0:
            return torch.full_like(local, -1)
        place = torch.searchsorted(self.indices, local).clamp_(max=self.count - 1)
        return torch.where(here & (self.indices[place] == local), place, -1)

    def rows_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Local row of each position (0 for -1)."""
        positions = positions.clamp(min=0)
        return positions if self.indices is None else self.indices[positions]

    def unit_rows_at(self, positions: torch.Tensor) -> torch.Tensor:
        """The unit row of each position, [B, d]; zeros for -1."""
        if self.count == 0:
            return self.weight.new_zeros(len(positions), self.weight.shape[1])
        rows = self.weight[self.rows_at(positions)]
        if not self.unit:
            rows = torch.nn.functional.normalize(rows, eps=_NORM_EPS)
        return rows * (positions >= 0).unsqueeze(1)

    def scale_at(self, positions: torch.Tensor) -> float | torch.Tensor:
        if not isinstance(self.scale, torch.Tensor):
            return self.scale
        if self.count == 0:
            return torch.ones(len(positions), dtype=self.weight.dtype, device=self.weight.device)
        return self.scale[self.rows_at(positions)]

    def needs_running_max(self, total_classes: int) -> bool:
        """Whether exp(logit) may leave the number range. A cosine is bounded by 1, so for one scale the answer is known beforehand.

        float16 operands always take the running maximum: its range is too small for a fixed shift."""
        if isinstance(self.scale, torch.Tensor) or (self.precision == "half" and self.weight.dtype == torch.float32):
            return True
        return self.scale + math.log(max(total_classes, 2)) > _MAX_EXPONENT[self.weight.dtype]


@dataclass
class Partial:
    """What one rank's classes contribute: `maximum` [B] (0 with a fixed shift), `total` [B] = sum of exp(z - maximum) over its negatives,
    `rows` [B, d] = sum of exp(z - maximum) * s_j * unit row j (None if not asked for)."""

    maximum: torch.Tensor
    total: torch.Tensor
    rows: torch.Tensor | None


def chunk_size(batch: int, dim: int, count: int, chunk: int | None, device: torch.device) -> int:
    """Classes a chunk. CPU: the chunk of logits and of rows stay in the second-level cache, about 4 MB. GPU: logits of about 256 MB."""
    if chunk is None:
        if device.type == "cuda":
            chunk = max(2048, min(65536, (64 << 20) // max(batch, 1)) // 1024 * 1024)
        else:
            chunk = max(256, min(4096, (1 << 20) // max(batch + dim, 1) // 256 * 256))
    return max(1, min(chunk, count))


@contextlib.contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Sets how float32 matmuls are carried out, and autocast off, for the passes only."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        wanted = {"tf32": "tf32"} if device.type == "cuda" else {"bfloat16": "bf16"}
        backend: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = backend.fp32_precision
        backend.fp32_precision = wanted.get(precision, "ieee")
        stack.callback(lambda: setattr(backend, "fp32_precision", before))
        yield


class _Workspace:
    """The buffers of one pass, and the chunk arithmetic both passes share."""

    def __init__(self, classes: Classes, embeddings: torch.Tensor) -> None:
        self.classes = classes
        weight = classes.weight
        batch, dim = embeddings.shape
        device = weight.device
        self.chunk = chunk_size(batch, dim, max(classes.count, 1), classes.chunk, device)
        # float16 / bfloat16 tensors where the hardware multiplies them into float32; elsewhere float32 tensors holding rounded values
        self.narrow = None
        if weight.dtype == torch.float32:
            self.narrow = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(classes.precision)
        self.native = self.narrow is not None and device.type == "cuda"
        self.operand_dtype = self.narrow if self.native and self.narrow is not None else weight.dtype
        self.rows = torch.empty(self.chunk, dim, dtype=self.operand_dtype, device=device)
        self.gathered = weight.new_empty(self.chunk, dim) if classes.indices is not None or self.native else None
        self.logits = weight.new_empty(batch, self.chunk)
        self.rounded = torch.empty(batch, self.chunk, dtype=self.operand_dtype, device=device) if self.native else None
        scalar = not isinstance(classes.scale, torch.Tensor)
        self.left = self.operand(embeddings * classes.scale if scalar else embeddings)

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as a factor of a matmul: rounded to the precision's number format."""
        if self.native:
            return x.to(self.operand_dtype)
        if self.narrow == torch.float16:
            return x.to(torch.float16).to(x.dtype)
        return x  # bfloat16 on a CPU: oneDNN rounds inside the matmul

    def load(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Unit rows of the chunk (times s_j where there is one per class), and 1/norm of the rows (None = unit)."""
        classes = self.classes
        if classes.indices is None:
            source = classes.weight[start:stop]
        else:
            assert self.gathered is not None
            source = torch.index_select(classes.weight, 0, classes.indices[start:stop], out=self.gathered[: stop - start])
        inverse = None
        factor: torch.Tensor | None = None
        if not classes.unit:
            inverse = torch.linalg.vector_norm(source, dim=1).clamp_(min=_NORM_EPS).reciprocal_()
            factor = inverse
        if isinstance(classes.scale, torch.Tensor):
            s = self.chunk_of(classes.scale, start, stop)
            factor = s if factor is None else factor * s
        rows = self.rows[: stop - start]
        if factor is None:
            rows.copy_(source)
        elif self.native:
            rows.copy_(source * factor.unsqueeze(1))
        else:
            torch.mul(source, factor.unsqueeze(1), out=rows)
            if self.narrow == torch.float16:
                rows.copy_(rows.to(torch.float16))
        return rows, inverse

    def chunk_of(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return values[start:stop] if self.classes.indices is None else values[self.classes.indices[start:stop]]

    def logits_of(self, rows: torch.Tensor) -> torch.Tensor:
        out = _narrowed(self.logits, len(rows))
        if self.native:
            return torch.mm(self.left, rows.t(), out_dtype=torch.float32, out=out)
        return torch.mm(self.left, rows.t(), out=out)

    def to_operand(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [B, k] of `logits_of` as a factor of a matmul, in this workspace's memory."""
        if self.rounded is not None:
            return _narrowed(self.rounded, x.shape[1]).copy_(x)
        return self.operand(x)

    def drop(self, logits: torch.Tensor, start: int, stop: int) -> None:
        """Negatives that do not take part become exp(-inf) = 0."""
        classes = self.classes
        if classes.threshold is not None:
            if isinstance(classes.scale, torch.Tensor):
                logits.masked_fill_(logits > (self.chunk_of(classes.scale, start, stop) * classes.threshold).unsqueeze(0), -math.inf)
            else:
                logits.masked_fill_(logits > classes.scale * classes.threshold, -math.inf)
        if classes.mask is not None:
            logits.masked_fill_(~self.chunk_of(classes.mask, start, stop).unsqueeze(0), -math.inf)

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.classes.count, self.chunk):
            yield start, min(start + self.chunk, self.classes.count)


def _narrowed(buffer: torch.Tensor, width: int) -> torch.Tensor:
    """The buffer's memory as a contiguous [B, width]."""
    return buffer if width == buffer.shape[1] else buffer.view(-1)[: buffer.shape[0] * width].view(-1, width)


def _set_target(chunk: torch.Tensor, positions: torch.Tensor, start: int, value: torch.Tensor | float) -> None:
    """chunk[i, positions[i] - start] = value[i] where that column is in the chunk; nothing is read back to the host."""
    column = positions - start
    here = ((column >= 0) & (column < chunk.shape[1])).unsqueeze(1)
    column = column.clamp(0, chunk.shape[1] - 1).unsqueeze(1)
    old = chunk.gather(1, column)
    new = value.unsqueeze(1).to(chunk.dtype) if isinstance(value, torch.Tensor) else torch.full_like(old, value)
    chunk.scatter_(1, column, torch.where(here, new, old))


def _half_gain(*coefficients: torch.Tensor) -> torch.Tensor:
    """The power of two that brings the largest coefficient of the gradient into [2^13, 2^14): float16 keeps full precision for 2^-28 of it."""
    largest = torch.stack([coefficient.abs().amax() for coefficient in coefficients]).amax()
    return torch.exp2(torch.floor(math.log2(_HALF_GAIN) - torch.log2(largest.clamp(min=1e-30))))


def forward_pass(
    classes: Classes, embeddings: torch.Tensor, positions: torch.Tensor, *, running: bool, need_rows: bool
) -> Partial:
    """Pass 1 over this rank's classes. `embeddings` [B, d] unit; `positions` [B] from `Classes.positions`."""
    batch, dim = embeddings.shape
    total = embeddings.new_zeros(batch)
    maximum = embeddings.new_full((batch,), -math.inf) if running else embeddings.new_zeros(batch)
    weighted = embeddings.new_zeros(batch, dim) if need_rows else None
    if batch == 0 or classes.count == 0:
        return Partial(maximum, total, weighted)
    with matmul_precision(classes.precision, embeddings.device):
        work = _Workspace(classes, embeddings)
        gain = _HALF_GAIN if work.narrow == torch.float16 else 1.0
        for start, stop in work.spans():
            rows, _ = work.load(start, stop)
            logits = work.logits_of(rows)
            if classes.fused:
                from lvtrain.classifier.logsumexp_triton import exponentials

                operand = logits if work.rounded is None else _narrowed(work.rounded, logits.shape[1])
                fade = exponentials(logits, operand, positions - start, maximum, total, running=running, ceiling=classes.ceiling, gain=gain)
                if work.rounded is None:
                    operand = work.operand(operand)
                if weighted is not None and fade is not None:
                    weighted.mul_(fade.unsqueeze(1))
            else:
                work.drop(logits, start, stop)
                _set_target(logits, positions, start, -math.inf)
                if running:
                    highest = torch.maximum(maximum, logits.amax(dim=1))
                    shift = highest.clamp(min=torch.finfo(highest.dtype).min)  # no negative so far: -inf minus -inf is not a number
                    logits.sub_(shift.unsqueeze(1))
                    fade = torch.exp(maximum - shift)
                    total.mul_(fade)
                    if weighted is not None:
                        weighted.mul_(fade.unsqueeze(1))
                    maximum = highest
                logits.exp_()
                total.add_(logits.sum(dim=1))
                if weighted is not None:
                    operand = work.to_operand(logits if gain == 1.0 else logits.mul_(gain))
            if weighted is not None:
                if work.native:
                    weighted.add_(torch.mm(operand, rows, out_dtype=torch.float32), alpha=1.0 / gain)
                else:
                    weighted.addmm_(operand, rows, alpha=1.0 / gain)
        if weighted is not None and not isinstance(classes.scale, torch.Tensor):
            weighted.mul_(classes.scale)
    return Partial(maximum, total, weighted)


def weight_gradient_pass(
    classes: Classes,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_logsumexp: torch.Tensor,
    grad_cosine: torch.Tensor,
    emit: Callable[[int, int, torch.Tensor], None] | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """Pass 2: the gradient of the rows that take part, written to `out` [k, d], or handed chunk by chunk to `emit(start, stop, gradient)`, which
    must be done with the tensor when it returns.

    `logsumexp` [B] over all ranks; `grad_logsumexp`, `grad_cosine` [B] the loss's derivatives. The gradient includes the derivative of the row
    normalisation."""
    if classes.count == 0 or len(embeddings) == 0:
        if out is not None:
            out.zero_()
        return
    with matmul_precision(classes.precision, embeddings.device):
        work = _Workspace(classes, embeddings)
        per_class = isinstance(classes.scale, torch.Tensor)
        scale = classes.scale_at(positions)
        gain = _half_gain(grad_logsumexp, grad_cosine / scale) if work.narrow == torch.float16 else None
        # p * dL/dN = exp(z - (N - log|dL/dN|)): the coefficient costs no pass of its own; its sign, and s, go to the embedding
        size = grad_logsumexp.abs() if gain is None else grad_logsumexp.abs() * gain
        shift = (logsumexp - torch.log(size)).nan_to_num_(nan=math.inf, posinf=math.inf).unsqueeze(1)
        sign = torch.where(grad_logsumexp < 0, -1.0, 1.0).to(embeddings.dtype)
        target = grad_cosine * sign / scale if gain is None else grad_cosine * sign / scale * gain
        right = work.operand(embeddings * sign.unsqueeze(1))
        if work.narrow is None and not per_class:
            right.mul_(classes.scale)  # saves a pass over the gradient; 16-bit numbers hold the unit vector better
        buffer = embeddings.new_empty(work.chunk, embeddings.shape[1]) if out is None else None
        product = embeddings.new_empty(work.chunk, embeddings.shape[1])
        for start, stop in work.spans():
            rows, inverse = work.load(start, stop)
            logits = work.logits_of(rows)
            if classes.fused:
                from lvtrain.classifier.logsumexp_triton import coefficients

                operand = logits if work.rounded is None else _narrowed(work.rounded, logits.shape[1])
                coefficients(logits, operand, positions - start, shift.squeeze(1), target, ceiling=classes.ceiling)
                if work.rounded is None:
                    operand = work.operand(operand)
            else:
                work.drop(logits, start, stop)
                logits.sub_(shift).exp_()
                _set_target(logits, positions, start, target)
                operand = work.to_operand(logits)
            gradient = out[start:stop] if out is not None else buffer[: stop - start]  # type: ignore[index]
            along = product[: stop - start]
            if work.native:
                torch.mm(operand.t(), right, out_dtype=torch.float32, out=gradient)
            else:
                torch.mm(operand.t(), right, out=gradient)
            if work.narrow is not None:
                factor = 1.0 if per_class else classes.scale
                gradient.mul_(factor if gain is None else factor / gain)
            # `rows` are s_j times the unit rows where there is one scale per class: with u the unit row, (g - (g.u) u) s = s g - (g.su) su / s
            torch.mul(gradient, rows, out=along)
            radial = along.sum(dim=1, keepdim=True)
            if per_class:
                s = work.chunk_of(classes.scale, start, stop).unsqueeze(1)  # type: ignore[arg-type]
                gradient.mul_(s)
                radial.div_(s)
            gradient.addcmul_(rows, radial, value=-1.0)
            if inverse is not None:
                gradient.mul_(inverse.unsqueeze(1))
            if emit is not None:
                emit(start, stop, gradient)
