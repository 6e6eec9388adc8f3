"""Plots of results: ROC over a logarithmic FAR, histograms of pair cosines, the hardest pairs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lvtrain.evaluation.bins import read_bin
from lvtrain.weights.extract import decode

_COLORS = ("#2c67c9", "#17866f", "#c24e3a", "#8a63d2", "#a86a00", "#68717d")
_TEAL, _RED = _COLORS[1], _COLORS[2]


def roc_of(results: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    """One plot, `roc`, of all results that have a curve; empty if none has."""
    curves = {name: result["roc"] for name, result in results.items() if "roc" in result}
    return {"roc": roc(curves)} if curves else {}


def roc(curves: dict[str, dict[str, list[float]]]) -> Figure:
    """True accept rate over false accept rate. `curves`: by name, `far` and `tar` of equal length."""
    figure, axes = _axes("ROC")
    lowest = 1.0
    for number, (name, curve) in enumerate(curves.items()):
        far, tar = np.asarray(curve["far"]), np.asarray(curve["tar"])
        shown = far > 0
        if shown.any():
            lowest = min(lowest, float(far[shown].min()))
            axes.step(far[shown], tar[shown], where="post", color=_COLORS[number % len(_COLORS)], label=name)
    axes.set_xscale("log")
    axes.set_xlim(lowest if lowest < 1 else 0.1, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("false accept rate")
    axes.set_ylabel("true accept rate")
    axes.legend(frameon=False)
    return figure


def cosines(name: str, result: dict[str, Any]) -> Figure:
    """Histograms of the cosines of positive and negative pairs. `result`: a verification result with `histogram`."""
    figure, axes = _axes(f"{name}: cosines of pairs")
    edges = np.asarray(result["histogram"]["edges"])
    for kind, color in (("negative", _RED), ("positive", _TEAL)):
        counts = np.asarray(result["histogram"][kind], dtype=float)
        label = f"{kind}, mean {result[f'{kind}_mean']:.3f}"
        axes.stairs(counts / max(1.0, counts.sum()), edges, fill=True, color=color, alpha=0.3, label=label)
        axes.stairs(counts / max(1.0, counts.sum()), edges, color=color)
    axes.axvline(result["cosine_threshold"], color="#1b1f24", linewidth=1, linestyle=(0, (4, 3)), label="threshold")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("cosine")
    axes.set_ylabel("share of the pairs")
    axes.legend(frameon=False)
    return figure


def hardest(name: str, result: dict[str, Any], path: Path, image_size: int = 112) -> Figure:
    """Pairs of one identity with the lowest cosines above, pairs of two identities with the highest below."""
    images, _ = read_bin(path)
    kinds = (
        ("positive", "same identity, lowest cosines", _TEAL),
        ("negative", "different identities, highest cosines", _RED),
    )
    columns = max(len(result["hardest"][kind]) for kind, _, _ in kinds)
    figure = Figure(figsize=(1.25 * columns + 0.4, 6.4), layout="constrained")
    figure.suptitle(f"{name}: hardest pairs", fontsize=12)
    parts: Any = figure.subfigures(2, 1)
    for part, (kind, title, color) in zip(parts, kinds):
        part.suptitle(title, fontsize=10, color=color)
        grid = part.subplots(2, columns, squeeze=False)
        for axes in grid.ravel():
            axes.axis("off")
        for column, (pair, cosine) in enumerate(result["hardest"][kind]):
            for row in (0, 1):
                grid[row, column].imshow(decode(images[2 * pair + row], image_size))
            grid[0, column].set_title(f"{cosine:.3f}", fontsize=8)
    return figure


def groups(name: str, kind: str, found: dict[str, Any]) -> Figure:
    """`kind` (`fmr` or `fnmr`) of each group with its interval, for every FMR of `found`, a result's `groups`."""
    figure, axes = _axes(f"{name}: {kind.upper()} by group")
    names = list(next(iter(found["at"].values()))["by_group"])
    for number, (fmr, one) in enumerate(found["at"].items()):
        rates = [one["by_group"][group] for group in names]
        values = np.array([each[kind] for each in rates])
        spans = np.abs(np.array([[each[f"{kind}_low"], each[f"{kind}_high"]] for each in rates]).T - values)
        places = np.arange(len(names)) + 0.12 * (number - (len(found["at"]) - 1) / 2)
        color = _COLORS[number % len(_COLORS)]
        axes.errorbar(places, values, yerr=spans, fmt="o", color=color, capsize=3, label=f"at FMR {fmr}")
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set_ylim(bottom=0)
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_ylabel(f"{kind.upper()}, {100 * found['confidence']:.0f}% interval")
    figure.legend(frameon=False, loc="outside right upper", fontsize=9)
    return figure


def of_groups(name: str, result: dict[str, Any]) -> dict[str, Figure]:
    """Plots of a result's error rates by group, by file name; empty if it has none."""
    found = result.get("groups") or {"at": {}}
    return {f"{name}_groups_{kind}": groups(name, kind, found) for kind in ("fmr", "fnmr") if found["at"]}


def of_discard(name: str, result: dict[str, Any]) -> dict[str, Figure]:
    """The plot of a result's error against discarded share, by file name; empty if it has none."""
    found = result.get("error_versus_discard") or {"at": {}}
    return {f"{name}_discard": discard(name, found)} if found["at"] else {}


def discard(name: str, found: dict[str, Any]) -> Figure:
    """FNMR over the discarded share, for every FMR of `found`, a result's `error_versus_discard`."""
    figure, axes = _axes(f"{name}: error against discarded share, by {found['quality']}")
    for number, (fmr, curve) in enumerate(found["at"].items()):
        color = _COLORS[number % len(_COLORS)]
        axes.step(found["discarded"], curve["fnmr"], where="post", color=color, label=f"at FMR {fmr}")
        start = curve["fnmr"][0]
        best = [max(0.0, (start - share) / (1 - share)) for share in found["discarded"]]
        axes.plot(found["discarded"], best, color=color, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("genuine comparisons discarded (dotted: as if every error were known)")
    axes.set_ylabel("FNMR of the rest")
    figure.legend(frameon=False, loc="outside right upper", fontsize=9)
    return figure


def _axes(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes
