"""Which sample is at position p of the endless stream. It is computed from (n, seed, block, p), never stored.

An epoch is n positions. The n samples are cut into blocks of `block` neighbours (the last may be shorter), and the blocks are shuffled.
Then each window of shuffled blocks (about 2^18 samples) is shuffled sample by sample. So reads go to one window of whole blocks at a
time, which suits a parallel file system, and neighbours in the stream come from the whole dataset. `block=1` is a full
shuffle.

Both shuffles are keyed bijections of [0, 2^k): twelve rounds of `x -> (x + a) * odd mod 2^k` and `x -> x ^ (x >> k/2)`. Values that land at or
above the size are mapped again until they lie below it (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
No array of size n exists. `tests/test_data_order.py` freezes the values: changing them changes every run ever started.
"""

from __future__ import annotations

import numpy as np

from lvtrain import randomness
from lvtrain.errors import UserError

WINDOW = 1 << 18
_ROUNDS = 12  # from 8 on, joint statistics of small domains pass a chi-square; 12 keeps a margin
_CHUNK = 1 << 14  # positions that are computed at once: the temporaries stay in a core's cache

Keys = list[tuple[np.ndarray, np.ndarray]]


class SampleOrder:
    """The endless order of `n` samples.

    Args:
        n: samples in an epoch, at least 1.
        seed: of the run.
        block: samples that stay together through the first shuffle (a run of a shard); 1 is a full shuffle.
    """

    def __init__(self, n: int, seed: int, block: int = 4096) -> None:
        if n < 1 or block < 1:
            raise UserError(f"an order needs at least one sample and a block of at least one, not n={n}, block={block}")
        self.n, self.seed, self.block = int(n), int(seed), int(min(block, n))
        self.full_blocks, self.rest = divmod(self.n, self.block)
        self.slots = self.full_blocks + bool(self.rest)
        self.window = 1 if self.block == 1 else max(1, WINDOW // self.block)  # slots that are mixed with each other
        self._hole = self.block - self.rest if self.rest else 0

    def at(self, positions: np.ndarray | range) -> np.ndarray:
        """Sample ids int64 [k] at non-negative positions [k] of the stream, in any order; the epoch is `position // n`."""
        positions = _int64(positions)
        ids = np.empty(len(positions), dtype=np.int64)
        for start in range(0, len(positions), _CHUNK):
            chunk = positions[start : start + _CHUNK]
            ids[start : start + _CHUNK] = self._at(chunk)
        return ids

    def epochs(self, positions: np.ndarray | range) -> np.ndarray:
        """The epoch of each position, int64 [k]."""
        return _int64(positions) // self.n

    def _at(self, positions: np.ndarray) -> np.ndarray:
        epoch = positions // self.n
        position = positions - epoch * self.n
        ids = np.empty(len(positions), dtype=np.int64)
        for first, last in _runs(epoch):
            number = int(epoch[first])
            ids[first:last] = self._in_epoch(number, position[first:last])
        return ids

    def _in_epoch(self, epoch: int, position: np.ndarray) -> np.ndarray:
        # The short block stands at a random slot. Positions are stretched to a line of equal slots with a hole behind that block's
        # samples, at the end of its window.
        short = int(randomness.uniform(self.seed, "order/short-block", epoch) * self.slots) if self.rest else self.slots
        size = self.window * self.block
        short_window = short // self.window
        line = self.slots * self.block
        window_end = min((short_window + 1) * size, line) - self._hole
        stretched = np.where(position < window_end, position, position + self._hole)
        window = stretched // size
        inside = stretched - window * size
        if self.window > 1 or self.block > 1:
            for first, last in _runs(window):
                number = int(window[first])
                samples = min(size, line - number * size) - (self._hole if number == short_window and self.rest else 0)
                keys = _keys(self.seed, "order/window", epoch, number)
                inside[first:last] = permute(inside[first:last], samples, keys)
        # inside the window the short block's missing samples are skipped again
        skip = (window == short_window) & (inside >= (short - short_window * self.window) * self.block + self.rest)
        inside = np.where(skip, inside + self._hole, inside)
        slot = window * self.window + inside // self.block
        block = np.where(slot > short, slot - 1, slot)
        is_short = slot == short
        block[is_short] = 0
        block = self._shuffled(block, _keys(self.seed, "order/blocks", epoch))
        block[is_short] = self.full_blocks
        return block * self.block + inside % self.block

    def _shuffled(self, block: np.ndarray, keys: Keys) -> np.ndarray:
        low, high = int(block.min()), int(block.max()) + 1
        if high - low >= len(block):
            return permute(block, self.full_blocks, keys)
        # neighbouring positions belong to one window, so to few blocks: each is computed once
        return permute(np.arange(low, high), self.full_blocks, keys)[block - low]


def permute(x: np.ndarray, size: int, keys: Keys) -> np.ndarray:
    """A keyed bijection of [0, size), element by element: int64 [k] -> int64 [k]."""
    if size < 2:
        return np.zeros_like(x)
    bits = int(size - 1).bit_length()
    result = _scramble(x.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(result >= np.uint64(size))
    while len(outside):
        walked = _scramble(result[outside], bits, keys)
        result[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return result.astype(np.int64)


def _scramble(x: np.ndarray, bits: int, keys: Keys) -> np.ndarray:
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(max(1, bits // 2))
    for add, factor in keys:
        x = x + add
        x *= factor
        x &= mask
        x ^= x >> shift
    return x


def _keys(seed: int, purpose: str, *counters: int) -> Keys:
    words = randomness.bits(seed, purpose, *counters, np.arange(2 * _ROUNDS))
    return [(words[2 * turn], words[2 * turn + 1] | np.uint64(1)) for turn in range(_ROUNDS)]


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Half-open ranges of equal neighbours."""
    if not len(values):
        return []
    edges = np.flatnonzero(np.diff(values)) + 1
    return list(zip([0, *edges.tolist()], [*edges.tolist(), len(values)]))


def _int64(positions: np.ndarray | range) -> np.ndarray:
    if isinstance(positions, range):
        return np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
    return np.asarray(positions, dtype=np.int64)
