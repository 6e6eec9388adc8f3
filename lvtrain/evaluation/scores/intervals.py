"""Intervals of error rates whose comparisons share identities.

Comparisons of the same identities are not independent. The variance of a rate p = sum(x) / n takes this into account: with
e = sum(x) - n p of the comparisons between identities i and j (a dyad), two dyads covary only where they share an identity (Aronow, Samii and
Assenova, 2015, "Cluster-robust variance estimation for dyadic data", Political Analysis 23):

    variance of the sum = sum over i of (sum over j of e_ij)^2 - sum over dyads i != j of e_ij^2

Genuine comparisons are dyads (i, i), so this is the variance between identities. The design effect is this variance over that of independent
comparisons, n p (1 - p). The interval is Wilson's with n / (design effect) comparisons, and Student's t with identities - 1 degrees of
freedom in place of the normal quantile.

A rate with few errors has an unreliable design effect. So it is at least 1, and at least that of all groups together. Where no group has an
error, only comparisons that share nobody count: as many as identities (genuine), or half as many (impostor).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Tally:
    """Errors of comparisons, and what the variance of their rate needs.

    Attributes:
        errors: comparisons decided wrongly.
        comparisons: their number n.
        identities: how many took part.
        independent: comparisons that share no identity, at most.
        variance: of the number of errors.
    """

    errors: int
    comparisons: int
    identities: int
    independent: int
    variance: float

    @property
    def rate(self) -> float:
        """Errors over comparisons."""
        return self.errors / self.comparisons

    def interval(self, confidence: float, together: float | None = None) -> tuple[float, float]:
        """Low and high.

        Args:
            confidence: such as 0.95.
            together: the design effect of all groups together, by `design_effect`; None where it has none.
        """
        own = design_effect([self])
        effects = [effect for effect in (own, together) if effect is not None]
        most = self.comparisons / self.independent
        effect = min(max(1.0, *effects), most) if effects else most
        effective = self.comparisons / effect
        quantile = float(student.ppf((1 + confidence) / 2, max(1, self.identities - 1)))
        return wilson(self.rate, effective, quantile)


def design_effect(tallies: list[Tally]) -> float | None:
    """Variance of the errors of all tallies over that of independent comparisons; None where none or all are errors."""
    plain = sum(one.errors * (1 - one.rate) for one in tallies)
    return sum(one.variance for one in tallies) / plain if plain else None


def wilson(rate: float, comparisons: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval of a rate over so many independent comparisons (Wilson, 1927)."""
    square = quantile**2 / comparisons
    middle = (rate + square / 2) / (1 + square)
    half = quantile / (1 + square) * np.sqrt(rate * (1 - rate) / comparisons + square / (4 * comparisons))
    # at the ends the formula gives 0 and 1 but for rounding
    return (float(middle - half) if rate > 0 else 0.0), (float(middle + half) if rate < 1 else 1.0)


class Dyads:
    """Comparisons [P] by the identities of their two sides. All are genuine, or all are impostor comparisons.

    Args:
        first: int [P], identities from 0.
        second: int [P].
    """

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        low, high = np.minimum(first, second).astype(np.int64), np.maximum(first, second).astype(np.int64)
        most = int(high.max()) + 1
        keys, self._place, self._counts = np.unique(low * most + high, return_inverse=True, return_counts=True)
        ends = np.stack([keys // most, keys % most])
        self._names, both = np.unique(ends, return_inverse=True)
        self._low, self._high = both.reshape(ends.shape)
        self._apart = self._low != self._high

    def tally(self, is_error: np.ndarray) -> Tally:
        """The tally of errors, bool [P]."""
        errors = np.bincount(self._place, weights=is_error, minlength=len(self._counts))
        excess = errors - self._counts * (errors.sum() / len(is_error))
        sums = np.bincount(self._low, weights=excess, minlength=len(self._names))
        apart = excess[self._apart]
        sums += np.bincount(self._high[self._apart], weights=apart, minlength=len(self._names))
        squares = float((apart**2).sum())
        return tally_sums(int(is_error.sum()), len(is_error), sums, squares, is_impostor=bool(self._apart.any()))


def tally_sums(errors: int, comparisons: int, sums: np.ndarray, squares: float, is_impostor: bool) -> Tally:
    """The tally from sums over dyads.

    Args:
        errors: comparisons decided wrongly.
        comparisons: their number.
        sums: excess errors e of each identity that took part, over its dyads.
        squares: the sum of e^2 over dyads of two identities.
        is_impostor: comparisons are between identities.
    """
    count = len(sums)
    # what makes it unbiased where identities differ and dyads add nothing: e_ij = a_i + a_j - 2 mean(a), or e_ii = a_i - mean(a)
    correction = count / max(1, count - 1)
    if is_impostor:
        correction = count * (count - 1) / max(1, (count - 2) * (count - 3))
    variance = correction * max(0.0, float((sums**2).sum()) - squares)
    return Tally(errors, comparisons, count, max(1, count // 2 if is_impostor else count), variance)
