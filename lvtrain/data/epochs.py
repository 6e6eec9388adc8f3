"""Counts what each epoch served: "every image exactly once" is counted here, not assumed.

Each rank adds up how many images it was served in an epoch, and a 64-bit hash of each image's id. The sums of all ranks
equal those of the whole dataset if every id came exactly once. Any other choice of ids has the same two sums with a
probability of about 2^-64. The sums are a few integers: ranks, restarts and another number of ranks just add them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from lvtrain import randomness
from lvtrain.data.order import SampleOrder

_MASK = (1 << 64) - 1
_AT_ONCE = 1 << 20


def hash_sum(ids: np.ndarray) -> int:
    """The sum, modulo 2^64, of a hash of each id: int64 [k] -> an integer that does not depend on their order."""
    with np.errstate(over="ignore"):
        return int(np.sum(randomness.bits(0, "epoch-count", ids), dtype=np.uint64))


@dataclass
class EpochSums:
    """Sums over a part of an epoch: of one rank, or of all.

    Attributes:
        served: images that went through a forward pass, each time counted.
        hashed: `hash_sum` of the ids of images served and skipped.
        undecoded: of the served ones, those that could not be decoded.
        nonfinite: of the served ones, those of steps without a finite loss.
        skipped: images that a roll-back skipped.
        uncounted: images before a checkpoint that has no sums.
    """

    served: int = 0
    hashed: int = 0
    undecoded: int = 0
    nonfinite: int = 0
    skipped: int = 0
    uncounted: int = 0

    def add(self, other: EpochSums) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        self.hashed &= _MASK


@dataclass(frozen=True)
class EpochCount:
    """What an epoch served, over all ranks.

    Attributes:
        epoch: its number, from 1.
        images: of the dataset.
        exact: every image was served or skipped exactly once; None where it could not be counted, or is not complete.
        distinct: different images served; None where that is not known.
        complete: False for the epoch in which a run ended.
    """

    epoch: int
    images: int
    served: int
    distinct: int | None
    undecoded: int
    nonfinite: int
    skipped: int
    uncounted: int
    exact: bool | None
    complete: bool = True

    @property
    def is_plain(self) -> bool:
        """Every image was seen exactly once and trained on; there is nothing else to say."""
        return bool(self.exact) and self.served == self.images and not self.undecoded and not self.nonfinite


class EpochTally:
    """Adds up what this rank is served, by epoch. Nothing here waits for a device or for another rank.

    Args:
        order: of the run; its `n` is the epoch's length.
        rank: of this process.
        size: number of ranks.
        stream: the place in the endless stream of samples from which this object counts.
    """

    def __init__(self, order: SampleOrder, rank: int, size: int, stream: int) -> None:
        self.order, self.rank, self.size = order, rank, size
        self.sums: dict[int, EpochSums] = {}
        self._unreported = stream // order.n  # the first epoch that `ended` has not given yet, the same on all ranks
        self._expected: int | None = None
        if rank == 0 and stream % order.n:
            self._of(self._unreported).uncounted = stream % order.n

    def add(self, first: int, ids: np.ndarray, bad_rows: Iterable[int] = (), *, finite: bool = True) -> None:
        """Counts one micro-batch of this rank.

        Args:
            first: place in the stream of its first sample, by the trainer's own position.
            ids: sample ids int64 [m], as the loader served them.
            bad_rows: rows that could not be decoded.
            finite: whether the step's loss was finite.
        """
        bad = np.zeros(len(ids), dtype=bool)
        bad[list(bad_rows)] = True
        for epoch, rows in self._by_epoch(first, len(ids)):
            count = rows.stop - rows.start
            hashed, undecoded = hash_sum(ids[rows]), int(np.count_nonzero(bad[rows]))
            self._of(epoch).add(EpochSums(count, hashed, undecoded, 0 if finite else count))

    def skip(self, start: int, stop: int) -> None:
        """Counts the samples at places `start` to `stop` of the stream as skipped by a roll-back. Call it on every rank."""
        if self.rank:
            return
        for first in range(start, stop, _AT_ONCE):
            ids = self.order.at(range(first, min(first + _AT_ONCE, stop)))
            for epoch, rows in self._by_epoch(first, len(ids)):
                self._of(epoch).add(EpochSums(hashed=hash_sum(ids[rows]), skipped=rows.stop - rows.start))

    def copy(self) -> dict[int, EpochSums]:
        """This rank's sums as they are now."""
        return {epoch: replace(sums) for epoch, sums in self.sums.items()}

    def state(self, of_ranks: Iterable[dict[int, EpochSums]]) -> dict[str, Any]:
        """The sums of all ranks as JSON, for a checkpoint."""
        return {str(epoch): asdict(sums) for epoch, sums in sorted(_together(of_ranks).items())}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over the sums of all ranks: rank 0 holds them, the others begin at zero."""
        stored = {int(epoch): EpochSums(**sums) for epoch, sums in state.items()}
        self._unreported = min(stored, default=self._unreported)
        self.sums = stored if self.rank == 0 else {}

    def ended(self, stream: int) -> Ended | None:
        """This rank's part of the epochs that have ended at place `stream` and were not given before; None if there are none."""
        last = stream // self.order.n
        if last <= self._unreported:
            return None
        self._unreported = last
        sums = {epoch: self.sums.pop(epoch) for epoch in sorted(self.sums) if epoch < last}
        return Ended(sums, self._expected_share())

    def _expected_share(self) -> int:
        if self._expected is None:
            first, last = (self.order.n * number // self.size for number in (self.rank, self.rank + 1))
            starts = range(first, last, _AT_ONCE)
            self._expected = sum(hash_sum(np.arange(start, min(start + _AT_ONCE, last))) for start in starts) & _MASK
        return self._expected

    def _by_epoch(self, first: int, count: int) -> Iterator[tuple[int, slice]]:
        """The epochs of `count` samples from place `first` of the stream on, and which of the samples are in each."""
        n, start = self.order.n, first
        while start < first + count:
            stop = min((start // n + 1) * n, first + count)
            yield start // n, slice(start - first, stop - first)
            start = stop

    def _of(self, epoch: int) -> EpochSums:
        return self.sums.setdefault(epoch, EpochSums())


@dataclass(frozen=True)
class Ended:
    """One rank's part of epochs that have ended: its sums, and `hash_sum` of its share of all ids."""

    sums: dict[int, EpochSums]
    expected: int


def counts(parts: Iterable[Ended], images: int) -> list[EpochCount]:
    """What the epochs that have ended served.

    Args:
        parts: of every rank.
        images: of the dataset.
    """
    parts = list(parts)
    expected, found = sum(part.expected for part in parts) & _MASK, []
    for epoch, sums in sorted(_together(part.sums for part in parts).items()):
        exact = sums.hashed == expected and sums.served + sums.skipped == images
        known = None if sums.uncounted else exact
        found.append(_count(epoch, sums, images, exact=known, distinct=sums.served if known else None))
    return found


def unfinished(of_ranks: Iterable[dict[int, EpochSums]], images: int) -> list[EpochCount]:
    """What the epoch in which the run ends has served, as far as it came; `of_ranks` are the sums of every rank."""
    return [
        _count(epoch, sums, images, exact=None, distinct=None, complete=False)
        for epoch, sums in sorted(_together(of_ranks).items())
    ]


def _together(of_ranks: Iterable[dict[int, EpochSums]]) -> dict[int, EpochSums]:
    whole: dict[int, EpochSums] = {}
    for rank in of_ranks:
        for epoch, sums in rank.items():
            whole.setdefault(epoch, EpochSums()).add(sums)
    return whole


def _count(epoch: int, sums: EpochSums, images: int, **known: Any) -> EpochCount:
    facts = {name: value for name, value in asdict(sums).items() if name != "hashed"}
    return EpochCount(epoch + 1, images, **facts, **known)


def epoch_line(count: EpochCount, ranks: int) -> str:
    """One line for the log."""
    name, seen = f"epoch {count.epoch}", f"{count.served:,} of {count.images:,} images"
    if count.uncounted:
        return (
            f"{name} cannot be counted: the run was resumed after its first {count.uncounted:,} of {count.images:,} images "
            "from a checkpoint without a count"
        )
    if not count.complete:
        return f"{name} is not complete: {seen} were seen when the run ended"
    if not count.exact:
        return (
            f"warning: {name}: {count.served:,} images were seen, but not each of {count.images:,} exactly once; "
            "this is an error of the data loader: please report it, with events.jsonl"
        )
    each = f"each of {count.images:,} images" if not count.skipped else seen
    left_out = [
        f"{number:,} {what}"
        for number, what in (
            (count.skipped, "skipped by a roll-back"),
            (count.undecoded, "could not be decoded"),
            (count.nonfinite, "in steps without a finite loss"),
        )
        if number
    ]
    rest = f"; {', '.join(left_out)}" if left_out else ""
    counted = f"counted on {ranks} rank{'s' if ranks > 1 else ''}"
    return f"{name}: {each} seen exactly once ({counted}){rest}"
