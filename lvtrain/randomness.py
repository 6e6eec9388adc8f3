"""Every random draw of lvtrain as a pure function of (seed, purpose, counters).

There is no generator state, so none is saved: code that needs the draw of step t, sample i or class j computes it. The draws
are the same for every number of ranks, every batch size and after every restart. The numpy and torch versions give the same
bits.

The mixer is two rounds of the splitmix64 finaliser (Steele, Lea, Flood 2014) over the key and each counter; it is a hash, not a cipher.
`tests/test_house_randomness.py` freezes its values: changing them changes every run ever started.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def key(seed: int, purpose: str) -> int:
    """The 64-bit key of one stream of draws, e.g. `key(recipe.seed, "class-sampling")`."""
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return x ^ (x >> np.uint64(31))


def bits(seed: int, purpose: str, *counters: int | np.ndarray) -> np.ndarray:
    """Uniform 64-bit words, uint64, one for every element of the broadcast counters (non-negative integers below 2^63)."""
    with np.errstate(over="ignore"):
        state = np.asarray(key(seed, purpose), dtype=np.uint64)
        for counter in counters:
            state = _mix((state ^ np.asarray(counter).astype(np.uint64)) + np.uint64(_GOLDEN))
        return _mix(state + np.uint64(_GOLDEN))


def uniform(seed: int, purpose: str, *counters: int | np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1), 53 bits, one for every element of the broadcast counters."""
    return (bits(seed, purpose, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int, purpose: str, *counters: int | np.ndarray) -> np.ndarray:
    """Standard normal float64 (Box-Muller over two independent uniforms)."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(seed, purpose + "/radius", *counters)))
    return radius * np.cos(2.0 * np.pi * uniform(seed, purpose + "/angle", *counters))


def torch_seed(seed: int, purpose: str, *counters: int) -> int:
    """A seed for `torch.manual_seed` or `torch.Generator.manual_seed`, in [0, 2^63)."""
    return int(bits(seed, purpose, *counters)) >> 1


def _as_int64(word: int) -> int:
    word &= _MASK
    return word - (1 << 64) if word >= 1 << 63 else word


def _torch_mix(x: torch.Tensor) -> torch.Tensor:
    # torch has no unsigned shift: shift arithmetically, then clear the copies of the sign bit
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _as_int64(_MULTIPLIER_1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _as_int64(_MULTIPLIER_2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def torch_bits(seed: int, purpose: str, *counters: int | torch.Tensor) -> torch.Tensor:
    """`bits` on the device of the last counter, which must be an int64 tensor: the same 64 bits, read as int64."""
    state: int | torch.Tensor = _as_int64(key(seed, purpose))
    for counter in counters:
        if isinstance(state, int) and isinstance(counter, int):
            with np.errstate(over="ignore"):
                word = _mix(np.asarray((state & _MASK) ^ counter, dtype=np.uint64) + np.uint64(_GOLDEN))
            state = _as_int64(int(word))
        else:
            state = _torch_mix(cast("torch.Tensor", counter ^ state) + _as_int64(_GOLDEN))
    if isinstance(state, int):
        raise TypeError("torch_bits needs at least one int64 tensor among its counters; use bits() for plain integers")
    return _torch_mix(state + _as_int64(_GOLDEN))


def torch_uniform(seed: int, purpose: str, *counters: int | torch.Tensor) -> torch.Tensor:
    """`uniform` on the counters' device: float64 in [0, 1), the same numbers as numpy's."""
    import torch

    word = torch_bits(seed, purpose, *counters)
    return ((word >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53
