"""What one pass over the classes reads: which class directions, which of them take part, in what chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lvtrain.classifier.margins.base import Margin
from lvtrain.classifier.numerics import EXACT, Formats, Numerics, chunk_size, formats

NORM_EPS = 1e-12  # as torch.nn.functional.normalize
MAX_EXPONENT = {torch.float32: 80.0, torch.float64: 650.0}


@dataclass(frozen=True)
class Anchor:
    """One direction per class that embeddings are compared with, and the margin on it.

    The class centres are the first anchor of every loss. A method may add more that get no gradient, as PCO adds its
    feature expectations.

    Attributes:
        rows: float [n_local, d], the directions of this rank's classes.
        margin: gives the target logit from the cosine to the sample's own class.
        valid: bool [n_local]; False: the class has no direction yet. It is then left out of the negatives, and its samples
            get no term from this anchor. None = all have one.
        is_unit: the rows have norm 1 already.
        own_negatives: False: the sum over the negatives of the first anchor is used instead of this one's.
    """

    rows: torch.Tensor
    margin: Margin
    valid: torch.Tensor | None = None
    is_unit: bool = False
    own_negatives: bool = True


@dataclass(frozen=True)
class Classes:
    """The classes that one pass runs over, on this rank.

    Attributes:
        weight: float [n_local, d], of any norm.
        scale: one number, or one per class: float [n_local].
        indices: int64 [k], the sorted local classes that take part; None = all.
        threshold: negatives with a larger cosine are dropped.
        mask: bool [n_local]; False: the class is not a negative.
        is_unit: the rows of `weight` have norm 1 already.
        numerics: number formats, kernel and memory.
        second: int64 [B], the position of each sample's second target (mixup), -1 = not here; None = there is none.
    """

    weight: torch.Tensor
    scale: float | torch.Tensor
    indices: torch.Tensor | None = None
    threshold: float | None = None
    mask: torch.Tensor | None = None
    is_unit: bool = False
    numerics: Numerics = EXACT
    second: torch.Tensor | None = None

    @classmethod
    def of(cls, anchor: Anchor, indices: torch.Tensor | None, numerics: Numerics) -> Classes:
        """The classes of an anchor that take part in a step."""
        margin = anchor.margin
        return cls(anchor.rows, margin.scale, indices, margin.filter_threshold, anchor.valid, anchor.is_unit, numerics)

    @property
    def formats(self) -> Formats:
        return formats(self.numerics.precision, self.weight.dtype, self.weight.device)

    @property
    def fused(self) -> bool:
        """Whether the Triton kernels do the elementwise work: with one scale, one target, no mask, and float32 logits."""
        plain = self.mask is None and self.second is None and not isinstance(self.scale, torch.Tensor)
        return self.numerics.kernel == "triton" and self.weight.dtype == torch.float32 and plain

    @property
    def ceiling(self) -> float | None:
        """The largest logit of a negative that takes part, for one scale."""
        return None if self.threshold is None or isinstance(self.scale, torch.Tensor) else self.scale * self.threshold

    @property
    def count(self) -> int:
        """k: how many classes take part here."""
        return len(self.weight) if self.indices is None else len(self.indices)

    def positions(self, labels: torch.Tensor, start: int) -> torch.Tensor:
        """Position of each global label among the classes of the pass: int64 [B], -1 = not here.

        `start` is the global id of this rank's first class.
        """
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
        if not self.is_unit:
            rows = torch.nn.functional.normalize(rows, eps=NORM_EPS)
        return rows * (positions >= 0).unsqueeze(1)

    def is_valid_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Whether the class at each position is here and is not masked: bool [B]."""
        assert self.mask is not None
        if self.count == 0:
            return torch.zeros_like(positions, dtype=torch.bool)
        return self.mask[self.rows_at(positions)] & (positions >= 0)

    def inverse_norms(self, rows: torch.Tensor) -> torch.Tensor | None:
        """1 / norm of rows [k, d] of the weight: [k]; None where they are unit vectors already."""
        return None if self.is_unit else torch.linalg.vector_norm(rows, dim=1).clamp_(min=NORM_EPS).reciprocal_()

    def needs_running_max(self, total_classes: int) -> bool:
        """Whether exp(logit) may leave the number range, so that the largest logit must be subtracted.

        A cosine is bounded by 1, so for one scale the answer is known beforehand. Float16 exponentials always need it.
        """
        if isinstance(self.scale, torch.Tensor) or self.formats.factor == torch.float16:
            return True
        return self.scale + math.log(max(total_classes, 2)) > MAX_EXPONENT[self.weight.dtype]


class Workspace:
    """The buffers of one pass, and the chunk arithmetic both passes share."""

    def __init__(self, classes: Classes, embeddings: torch.Tensor) -> None:
        self.classes, self.formats = classes, classes.formats
        weight = classes.weight
        batch, dim = embeddings.shape
        self.chunk = chunk_size(batch, dim, max(classes.count, 1), classes.numerics.chunk, weight.device)
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
        """The chunk's rows of the weight, not normalised."""
        if self.classes.indices is None:
            return self.classes.weight[start:stop]
        assert self.gathered is not None
        return torch.index_select(
            self.classes.weight, 0, self.classes.indices[start:stop], out=self.gathered[: stop - start]
        )

    def inverse_norms(self, source: torch.Tensor) -> torch.Tensor | None:
        """As `Classes.inverse_norms`; None also where the kernels compute the norms themselves."""
        return None if self.classes.fused else self.classes.inverse_norms(source)

    def unit_rows(self, source: torch.Tensor, inverse: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
        """The chunk's unit rows in the format of `formats.unit`, times s_j where there is one scale per class."""
        if self.classes.fused and not self.classes.is_unit:
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
        """Sets the logits of the targets and of dropped negatives to -inf, in place, so that exp gives 0."""
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
        for targets in [positions] if classes.second is None else [positions, classes.second]:
            column, here = within(targets, start, stop)
            column = column.unsqueeze(1)
            logits.scatter_(1, column, logits.gather(1, column).masked_fill_(here.unsqueeze(1), -math.inf))


def within(positions: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each position in the chunk (clamped into it), and whether it lies there. The host never waits."""
    column = positions - start
    return column.clamp(0, stop - start - 1), (column >= 0) & (column < stop - start)


def _narrowed(buffer: torch.Tensor, width: int) -> torch.Tensor:
    """The buffer's memory as a contiguous [B, width]."""
    return buffer if width == buffer.shape[1] else buffer.view(-1)[: buffer.shape[0] * width].view(-1, width)
