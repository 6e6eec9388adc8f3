"""Error rates by group of identities at one common threshold, with intervals, and how far the groups are apart.

The threshold is that of a false match rate over all impostor comparisons of the benchmark, whatever their groups. At it, for a group g:

- FNMR_g: the share of the genuine comparisons of g that are refused.
- FMR_g: the share of the impostor comparisons within g (both sides are of g) that are accepted.

Between groups, for FMR and for FNMR, as ISO/IEC 19795-10 asks for the spread of the rates of groups:

- ratio = max over g of R_g / min over g of R_g. It has no value if the best rate is 0.
- difference = max over g of R_g - min over g of R_g.
- worst to geometric mean = max over g of R_g / (product over g of R_g)^(1/groups), of NIST IR 8429. It has no value if a rate is 0.

Intervals of rates: `intervals`. The intervals of ratio and difference hold for the true worst and best group, whichever they are: the intervals
of all groups are taken at the confidence c^(1/groups), so that all of them hold together with confidence c; then

    max of low / min of high <= ratio <= max of high / min of low        (at least 1)
    max of low - min of high <= difference <= max of high - min of low   (at least 0)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation.scores.intervals import Dyads, Tally, design_effect, tally_sums
from lvtrain.evaluation.verification import resolved

TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
CONFIDENCE = 0.95
_TILE = 4096
Rates = dict[str, dict[str, Tally]]  # "fmr" or "fnmr" -> group -> its tally


@dataclass(frozen=True)
class Pairs:
    """Comparisons [P]: cosines, whether they are genuine, and the items (int: images or templates) on both sides."""

    cosines: np.ndarray
    issame: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def identities(self, same: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
        """An identity int64 for every item [I]: items that genuine comparisons connect, or that are the same in the pairs `same`, share one."""
        count = int(max(self.first.max(), self.second.max())) + 1
        starts, ends = self.first[self.issame], self.second[self.issame]
        if same is not None:
            starts, ends = np.append(starts, same[0]), np.append(ends, same[1])
        graph = coo_array((np.ones(len(starts), dtype=bool), (starts, ends)), shape=(count, count))
        return connected_components(graph, directed=False)[1].astype(np.int64)


def thresholds(cosines: np.ndarray, issame: np.ndarray, targets: tuple[float, ...] = TARGETS) -> dict[str, float]:
    """Target FMR -> the lowest cosine that accepts at most this share of the impostor comparisons. Targets that they cannot resolve are left out."""
    falling = np.sort(cosines[~issame])[::-1]
    found = {}
    for target in resolved(targets, len(falling)):
        allowed = int(target * len(falling) * (1 + 1e-12))
        found[f"{target:.0e}"] = float(np.nextafter(falling[allowed], 2.0) if allowed < len(falling) else falling[-1])
    return found


def of_pairs(
    pairs: Pairs, groups: np.ndarray, identities: np.ndarray, at: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """JSON values of `summary` for a list of comparisons.

    Args:
        pairs: the comparisons.
        groups: the group of every item [I], object; None for an item without one.
        identities: int [I] from 0, such as `Pairs.identities`.
        at: target FMR -> threshold; by default `thresholds`.

    Raises:
        UserError: fewer than two groups with genuine and impostor comparisons of their own.
    """
    at = thresholds(pairs.cosines, pairs.issame) if at is None else at
    names = sorted({str(group) for group in groups if group is not None})
    number = np.array([-1 if group is None else names.index(group) for group in groups], dtype=np.int64)
    within = np.where(number[pairs.first] == number[pairs.second], number[pairs.first], -1)
    found: dict[str, Rates] = {target: {"fmr": {}, "fnmr": {}} for target in at}
    for position, name in enumerate(names):
        for kind, part in (("fmr", ~pairs.issame), ("fnmr", pairs.issame)):
            chosen = np.flatnonzero(part & (within == position))
            if len(chosen):
                dyads = Dyads(identities[pairs.first[chosen]], identities[pairs.second[chosen]])
                for target, threshold in at.items():
                    is_accepted = pairs.cosines[chosen] >= threshold
                    found[target][kind][name] = dyads.tally(is_accepted == (kind == "fmr"))
    return summary(at, found, without=int((number < 0).sum()))


def of_identities(
    rows: np.ndarray,
    labels: np.ndarray,
    groups: Mapping[int, str],
    at: Mapping[str, float],
    *,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> dict[str, Any]:
    """JSON values of `summary` for all pairs of a labelled set. The ranks share the work; the result is the same on each.

    Args:
        rows: float32 [N, d], of unit length.
        labels: int [N], of the identities.
        groups: label -> group; identities that are not in it are left out.
        at: target FMR -> threshold, over all pairs of the set.
        device: where the cosines are computed.
        world: this process among the ranks; None for one process alone.

    Raises:
        UserError: as `of_pairs`.
    """
    found: dict[str, Rates] = {target: {"fmr": {}, "fnmr": {}} for target in at}
    without = int(np.isin(np.unique(labels), list(groups), invert=True).sum())
    for name in sorted(set(groups.values())):
        mine = np.flatnonzero(np.isin(labels, [label for label, group in groups.items() if group == name]))
        mine = mine[np.argsort(labels[mine], kind="stable")]
        if len(mine) > 1:
            for target, rates in _all_pairs(
                rows[mine].astype(np.float32), labels[mine], at, torch.device(device), world
            ).items():
                for kind, tally in rates.items():
                    found[target][kind][name] = tally
    return summary(at, found, without=without)


def summary(at: Mapping[str, float], found: Mapping[str, Rates], *, without: int) -> dict[str, Any]:
    """What tables and plots show.

    Returns:
        confidence, without_group (items or identities); at: target FMR -> {threshold, by_group: group -> {fmr, fmr_low, fmr_high,
        impostor_comparisons, fnmr, fnmr_low, fnmr_high, genuine_comparisons, identities}, fmr and fnmr: {worst, best, ratio,
        ratio_low, ratio_high, difference, difference_low, difference_high, worst_to_geometric_mean}}. A ratio without value is null, and
        so is a `ratio_high` without limit.

    Raises:
        UserError: fewer than two groups with genuine and impostor comparisons of their own.
    """
    values: dict[str, Any] = {"confidence": CONFIDENCE, "without_group": without, "at": {}}
    for target, rates in found.items():
        names = sorted(rates["fmr"].keys() & rates["fnmr"].keys())
        if len(names) < 2:
            raise UserError(
                f"{len(names)} group(s) have both genuine and impostor comparisons of their own, two are needed; "
                "look at the names in the file of groups"
            )
        by_group: dict[str, dict[str, Any]] = {name: {} for name in names}
        one: dict[str, Any] = {"threshold": at[target], "by_group": by_group}
        for kind, what in (("fmr", "impostor_comparisons"), ("fnmr", "genuine_comparisons")):
            tallies = {name: rates[kind][name] for name in names}
            together = design_effect(list(tallies.values()))
            for name, tally in tallies.items():
                low, high = tally.interval(CONFIDENCE, together)
                by_group[name] |= {kind: tally.rate, f"{kind}_low": low, f"{kind}_high": high, what: tally.comparisons}
                by_group[name]["identities"] = max(tally.identities, by_group[name].get("identities", 0))
            one[kind] = _between(tallies, together)
        values["at"][target] = one
    return values


def _between(tallies: dict[str, Tally], together: float | None) -> dict[str, Any]:
    rates = {name: tally.rate for name, tally in tallies.items()}
    worst, best = max(rates, key=rates.__getitem__), min(rates, key=rates.__getitem__)
    confidence = CONFIDENCE ** (1 / len(tallies))
    lows, highs = zip(*(tally.interval(confidence, together) for tally in tallies.values()))
    every = np.array(list(rates.values()))
    return {
        "worst": worst,
        "best": best,
        "ratio": rates[worst] / rates[best] if rates[best] else None,
        "ratio_low": max(1.0, max(lows) / min(highs)),
        "ratio_high": max(highs) / min(lows) if min(lows) > 0 else None,
        "difference": rates[worst] - rates[best],
        "difference_low": max(0.0, max(lows) - min(highs)),
        "difference_high": max(highs) - min(lows),
        "worst_to_geometric_mean": rates[worst] / float(np.exp(np.log(every).mean())) if every.all() else None,
    }


def _all_pairs(
    rows: np.ndarray, labels: np.ndarray, at: Mapping[str, float], device: torch.device, world: World | None
) -> dict[str, dict[str, Tally]]:
    """Tallies of one group. Tiles end where identities end, so that every dyad is in one tile."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    _, sizes = np.unique(labels, return_counts=True)
    ends = np.cumsum(sizes)
    # identities of each tile: as many as have _TILE images together, at least one
    cuts = np.unique(np.append(np.searchsorted(ends, np.arange(_TILE, ends[-1], _TILE), side="right"), [0, len(sizes)]))
    held = torch.from_numpy(rows).to(device)
    owner = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device)
    counts = torch.from_numpy(sizes).to(device, torch.float64)
    limits = list(at.values())
    # for every threshold: accepted impostor comparisons of each identity; sums over dyads of accepted^2 and of accepted x comparisons
    accepted = torch.zeros(len(limits), len(sizes), dtype=torch.float64, device=device)
    moments = torch.zeros(len(limits), 2, dtype=torch.float64, device=device)
    own = torch.zeros(len(limits), len(sizes), dtype=torch.float64, device=device)  # accepted genuine comparisons
    spans = list(itertools.pairwise(cuts))
    tiles = [(one, other) for i, one in enumerate(spans) for other in spans[i:]]
    for one, other in tiles[rank::size]:
        first, second = (slice(ends[a] - sizes[a], ends[b - 1]) for a, b in (one, other))
        scores = held[first] @ held[second].T
        if one == other:
            scores.masked_fill_(
                torch.ones_like(scores, dtype=torch.bool).tril_(), -2.0
            )  # each pair once, no image with itself
        for position, limit in enumerate(limits):
            hits = _by_identity(scores >= limit, owner[first] - one[0], owner[second] - other[0])
            if one == other:
                own[position, slice(*one)] = hits.diagonal()
                hits = hits.triu(1)
            accepted[position, slice(*one)] += hits.sum(1)
            accepted[position, slice(*other)] += hits.sum(0)
            moments[position, 0] += hits.square().sum()
            moments[position, 1] += (hits * counts[slice(*one), None] * counts[slice(*other)]).sum()
    if size > 1:
        place = "cuda" if dist.get_backend() == "nccl" else "cpu"
        parts = [part.to(place) for part in (accepted, moments, own)]
        for part in parts:
            dist.all_reduce(part)
        accepted, moments, own = parts
    of_each, sums, genuine = (part.cpu().numpy() for part in (accepted, moments, own))
    return {
        target: _tallies(sizes, of_each[position], sums[position], genuine[position])
        for position, target in enumerate(at)
    }


def _tallies(sizes: np.ndarray, accepted: np.ndarray, moments: np.ndarray, own: np.ndarray) -> dict[str, Tally]:
    images = sizes.astype(np.float64)
    total = images.sum()
    found: dict[str, Tally] = {}
    comparisons = images * (total - images)  # of each identity
    errors, count = accepted.sum() / 2, comparisons.sum() / 2
    if len(sizes) > 1:
        rate = errors / count
        of_dyads = ((images**2).sum() ** 2 - (images**4).sum()) / 2
        squares = moments[0] - 2 * rate * moments[1] + rate**2 * of_dyads
        excess = accepted - rate * comparisons
        found["fmr"] = tally_sums(round(errors), round(count), excess, float(squares), is_impostor=True)
    several = sizes > 1
    if several.any():
        each = images[several] * (images[several] - 1) / 2
        refused = each - own[several]
        excess = refused - each * refused.sum() / each.sum()
        found["fnmr"] = tally_sums(round(refused.sum()), round(each.sum()), excess, 0.0, is_impostor=False)
    return found


def _by_identity(hits: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Sums of bool [a, b] over the rows and columns of each identity, float64; `first` [a] and `second` [b] rise from 0."""
    height, width = int(first[-1]) + 1, int(second[-1]) + 1
    tall = torch.zeros(height, hits.shape[1], device=hits.device).index_add_(0, first, hits.float())
    return torch.zeros(height, width, device=hits.device).index_add_(1, second, tall).double()
