"""How the classifier computes: number formats, kernel, chunk size, and the memory it may use to save work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from lvtrain.errors import UserError

Precision = Literal["float32", "tf32", "half", "bfloat16"]
Kernel = Literal["auto", "torch", "triton"]
Wire = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Numerics:
    """The classifier's numerical settings. They change speed, memory and rounding, not the loss that is computed.

    Attributes:
        precision: number format of the matmuls' operands, see `formats`. `float32`. `tf32`: float32 tensors, multiplied as
            TF32 on CUDA. `half`: float16 operands with float32 cosines and sums; relative gradient error below 1e-3.
            `bfloat16`: the same with bfloat16; below 1e-2 (on a CPU the cosines stay float32: below 3e-3).
        kernel: what computes between the matmuls: `torch`, `triton` (CUDA only), or `auto` (see `kernel.choose_kernel`).
        chunk: classes in one chunk; None = chosen from the shapes (see `chunk_size`).
        keep_mb: MB of extra memory for keeping exp(logits) from forward to backward. Whatever fits is not computed again,
            which saves one of four matmuls. The gradient buffer already gives free room: for all of them when the gathered
            micro-batch is at most d (2 d in 16 bits). So this matters only for larger batches.
        gather: number format in which embeddings and their gradients travel between ranks.

    Raises:
        UserError: an unknown name.
    """

    precision: Precision = "float32"
    kernel: Kernel = "auto"
    chunk: int | None = None
    keep_mb: float = 8.0
    gather: Wire = "float32"

    def __post_init__(self) -> None:
        for name, known in (("precision", Precision), ("kernel", Kernel), ("gather", Wire)):
            value = getattr(self, name)
            if value not in get_args(known):
                names = ", ".join(get_args(known))
                raise UserError(f"classifier.numerics.{name}: {value!r} is not one of {names}")

    def without_keeping(self) -> Numerics:
        """The same for a pass whose class directions get no gradient: nothing is kept for backward."""
        return replace(self, keep_mb=0.0)


EXACT = Numerics()


@dataclass(frozen=True)
class Formats:
    """Number formats of a pass over the classes.

    Logits, sums and the target's own terms keep the weight's format.

    Attributes:
        unit: of the vectors that are multiplied into cosines.
        factor: of the exponentials and vectors that are multiplied into gradients.
        emulated: values are rounded to those formats, but multiplied in float32.
    """

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
    """The formats of a `precision` for a weight of `dtype` on `device`.

    A GPU multiplies 16-bit numbers into float32. PyTorch on a CPU returns bfloat16 for bfloat16, which spoils the logits
    (gradient error late in training 1e-2), so `bfloat16` keeps float32 cosines there. A CPU without instructions for a
    format (float16; bfloat16 below AVX-512, where PyTorch's own matmul is 5 to 100 times slower than float32's) rounds to
    it and multiplies in float32: it has a GPU's rounding without its speed.
    """
    if dtype != torch.float32 or precision in ("float32", "tf32"):
        return Formats(dtype, dtype)
    narrow = torch.float16 if precision == "half" else torch.bfloat16
    if device.type == "cuda":
        return Formats(narrow, narrow)
    if precision == "half":
        return Formats(narrow, narrow, emulated=True)
    return Formats(torch.float32, narrow, emulated=not multiplies_bfloat16())


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return not torch.backends.cpu.get_cpu_capability().startswith(("DEFAULT", "NO AVX", "AVX2"))


def chunk_size(batch: int, dim: int, count: int, chunk: int | None, device: torch.device) -> int:
    """Classes in a chunk, at most `count`.

    On a CPU the logits and rows of a chunk stay in the second-level cache (about 4 MB); on a GPU a chunk has about 256 MB
    of logits.
    """
    if chunk is None:
        if device.type == "cuda":
            chunk = max(2048, min(65536, (64 << 20) // max(batch, 1)) // 1024 * 1024)
        else:
            chunk = max(256, min(4096, (1 << 20) // max(batch + dim, 1) // 256 * 256))
    return max(1, min(chunk, count))


@contextlib.contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Sets how float32 matmuls are computed, and turns autocast off, inside the passes only."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        backend: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = backend.fp32_precision
        backend.fp32_precision = "tf32" if precision == "tf32" and device.type == "cuda" else "ieee"
        stack.callback(lambda: setattr(backend, "fp32_precision", before))
        yield
