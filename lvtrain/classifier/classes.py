"""What one pass over the class rows needs to know: which rows take part, in which number formats, in what chunks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lvtrain.errors import UserError

PRECISIONS = ("float32", "tf32", "half", "bfloat16")
NORM_EPS = 1e-12  # as torch.nn.functional.normalize
_MAX_EXPONENT = {torch.float32: 80.0, torch.float64: 650.0}


@dataclass(frozen=True)
class Formats:
    """Number formats of a pass: `unit` the vectors multiplied into cosines, `factor` the exponentials and vectors multiplied into gradients.
    Logits, sums and the target's own terms are in the weight's format. `emulated`: rounded to those formats, but multiplied in float32."""

    unit: torch.dtype
    factor: torch.dtype
    emulated: bool = False

    def operand(self, rounded: torch.Tensor) -> torch.Tensor:
        """A tensor in a 16-bit format as the matmul takes it."""
        return rounded.to(torch.float32) if self.emulated else rounded

    def as_unit(self, x: torch.Tensor) -> torch.Tensor:
        return self.operand(x.to(self.unit))

    def as_factor(self, x: torch.Tensor) -> torch.Tensor:
        return self.operand(x.to(self.factor))


def formats(precision: str, dtype: torch.dtype, device: torch.device) -> Formats:
    """A GPU multiplies 16-bit numbers into float32. PyTorch on a CPU gives bfloat16 for bfloat16, which spoils logits (gradient error late in
    training 1e-2): there `bfloat16` keeps the cosines in float32. What a CPU has no instructions for (float16; below AVX-512 bfloat16 too, where
    PyTorch's own matmul is 5 to 100 times slower than float32's) is rounded and then multiplied in float32: a GPU's rounding without its speed."""
    if dtype != torch.float32 or precision in ("float32", "tf32"):
        return Formats(dtype, dtype)
    narrow = torch.float16 if precision == "half" else torch.bfloat16
    if device.type == "cuda":
        return Formats(narrow, narrow)
    if precision == "half":
        return Formats(narrow, narrow, emulated=True)
    return Formats(torch.float32, narrow, emulated=not multiplies_bfloat16())


def multiplies_bfloat16() -> bool:
    """Whether this CPU's matmuls of bfloat16 are worth having."""
    return not torch.backends.cpu.get_cpu_capability().startswith(("DEFAULT", "NO AVX", "AVX2"))


@dataclass(frozen=True)
class Classes:
    """The class rows one pass runs over, on this rank.

    `weight` [local, d] any norm; `indices` int64 [k] sorted local rows that take part, None = all; `scale` one number, or one per local row
    ([local]); `threshold` drops negatives with a larger cosine; `mask` bool [local], False = the class is no negative; `unit` = rows already
    have norm 1; `keep_mb` memory beyond the rows' gradient in which pass 1 may leave exponentials for pass 2.
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
    keep_mb: float = 0.0

    def __post_init__(self) -> None:
        if self.kernel not in ("torch", "triton"):
            raise UserError(f"classifier.kernel: {self.kernel!r} is not torch or triton")
        if self.precision not in PRECISIONS:
            raise UserError(f"classifier.precision: {self.precision!r} is not one of {', '.join(PRECISIONS)}")

    @property
    def formats(self) -> Formats:
        return formats(self.precision, self.weight.dtype, self.weight.device)

    @property
    def fused(self) -> bool:
        """Whether the Triton kernels do the elementwise work: they know one scale, no mask, and float32 logits."""
        plain = self.mask is None and not isinstance(self.scale, torch.Tensor)
        return self.kernel == "triton" and self.weight.dtype == torch.float32 and plain

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
            rows = torch.nn.functional.normalize(rows, eps=NORM_EPS)
        return rows * (positions >= 0).unsqueeze(1)

    def inverse_norms(self, rows: torch.Tensor) -> torch.Tensor | None:
        """1 / norm of rows [k, d] of the weight: [k]; None where they are unit vectors already."""
        return None if self.unit else torch.linalg.vector_norm(rows, dim=1).clamp_(min=NORM_EPS).reciprocal_()

    def needs_running_max(self, total_classes: int) -> bool:
        """Whether exp(logit) may leave the number range. A cosine is bounded by 1, so for one scale the answer is known beforehand.

        float16 exponentials always take the running maximum: the format's range is too small for a fixed shift."""
        if isinstance(self.scale, torch.Tensor) or self.formats.factor == torch.float16:
            return True
        return self.scale + math.log(max(total_classes, 2)) > _MAX_EXPONENT[self.weight.dtype]


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
        backend: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = backend.fp32_precision
        backend.fp32_precision = "tf32" if precision == "tf32" and device.type == "cuda" else "ieee"
        stack.callback(lambda: setattr(backend, "fp32_precision", before))
        yield


class Workspace:
    """The buffers of one pass, and the chunk arithmetic both passes share."""

    def __init__(self, classes: Classes, embeddings: torch.Tensor) -> None:
        self.classes, self.formats = classes, classes.formats
        weight = classes.weight
        batch, dim = embeddings.shape
        self.chunk = chunk_size(batch, dim, max(classes.count, 1), classes.chunk, weight.device)
        self.rows = weight.new_empty(self.chunk, dim)
        narrow = not self.formats.emulated and self.formats.unit != weight.dtype
        self.units = torch.empty_like(self.rows, dtype=self.formats.unit) if narrow else self.rows
        self.gathered = weight.new_empty(self.chunk, dim) if classes.indices is not None else None
        self.logits = weight.new_empty(batch, self.chunk)
        scalar = not isinstance(classes.scale, torch.Tensor)
        self.left = self.formats.as_unit(embeddings * classes.scale if scalar else embeddings)

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.classes.count, self.chunk):
            yield start, min(start + self.chunk, self.classes.count)

    def source(self, start: int, stop: int) -> torch.Tensor:
        """The chunk's rows of the weight as they are."""
        if self.classes.indices is None:
            return self.classes.weight[start:stop]
        assert self.gathered is not None
        return torch.index_select(
            self.classes.weight, 0, self.classes.indices[start:stop], out=self.gathered[: stop - start]
        )

    def inverse_norms(self, source: torch.Tensor) -> torch.Tensor | None:
        """As `Classes.inverse_norms`; None also where the kernels find them by themselves."""
        return None if self.classes.fused else self.classes.inverse_norms(source)

    def unit_rows(self, source: torch.Tensor, inverse: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
        """The chunk's unit rows in the format of `formats.unit`, times s_j where there is one scale per class."""
        if self.classes.fused and not self.classes.unit:
            from lvtrain.classifier.logsumexp_triton import unit_rows

            return self.formats.as_unit(unit_rows(source, self.units[: stop - start], eps=NORM_EPS))
        factor = inverse
        if isinstance(self.classes.scale, torch.Tensor):
            s = self.of_chunk(self.classes.scale, start, stop)
            factor = s if factor is None else factor * s
        if factor is None:
            return self.formats.as_unit(source)
        return self.formats.as_unit(torch.mul(source, factor.unsqueeze(1), out=self.units[: stop - start]))

    def logits_of(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[B, k], in this workspace's memory or in `out`."""
        out = _narrowed(self.logits, len(rows)) if out is None else out
        if rows.dtype != out.dtype:
            return torch.mm(self.left, rows.t(), out_dtype=out.dtype, out=out)
        return torch.mm(self.left, rows.t(), out=out)

    def of_chunk(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return values[start:stop] if self.classes.indices is None else values[self.classes.indices[start:stop]]

    def drop(self, logits: torch.Tensor, positions: torch.Tensor, start: int, stop: int) -> None:
        """The target, and negatives that do not take part, become exp(-inf) = 0."""
        classes = self.classes
        if classes.threshold is not None:
            if isinstance(classes.scale, torch.Tensor):
                logits.masked_fill_(
                    logits > (self.of_chunk(classes.scale, start, stop) * classes.threshold).unsqueeze(0), -math.inf
                )
            else:
                logits.masked_fill_(logits > classes.scale * classes.threshold, -math.inf)
        if classes.mask is not None:
            logits.masked_fill_(~self.of_chunk(classes.mask, start, stop).unsqueeze(0), -math.inf)
        column, here = within(positions, start, stop)
        column = column.unsqueeze(1)
        logits.scatter_(1, column, logits.gather(1, column).masked_fill_(here.unsqueeze(1), -math.inf))


def within(positions: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each position stands in the chunk (clamped into it), and whether it is there; nothing is read back to the host."""
    column = positions - start
    return column.clamp(0, stop - start - 1), (column >= 0) & (column < stop - start)


def _narrowed(buffer: torch.Tensor, width: int) -> torch.Tensor:
    """The buffer's memory as a contiguous [B, width]."""
    return buffer if width == buffer.shape[1] else buffer.view(-1)[: buffer.shape[0] * width].view(-1, width)
