"""Values under the pointer, without a script: transparent strips over a figure, each with an SVG title."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
from matplotlib.figure import Figure

STRIPS = 72  # at most, of a figure
POINT = 72  # of an inch, the unit of matplotlib's SVG
Mark = tuple[float, str]  # the x that a strip is around, and its words
Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def over_steps(curves: Curves, *, percent: bool = False) -> list[Mark]:
    """The values of all curves (steps and values) near steps of the first."""
    steps = next(iter(curves.values()))[0]
    places = steps[np.unique(np.linspace(0, len(steps) - 1, min(STRIPS, len(steps))).astype(int))] if len(steps) else []
    marks = []
    for place in places:
        lines = [f"step {place:,.0f}"]
        for name, (x, y) in curves.items():
            if len(x) and x[0] <= place <= x[-1]:
                value = float(y[np.abs(x - place).argmin()])
                lines.append(f"{name}: {f'{100 * value:.4g}%' if percent else f'{value:.4g}'}")
        marks.append((float(place), "\n".join(lines)))
    return marks


def of_roc(curves: dict[str, dict[str, Any]]) -> list[Mark]:
    """TAR of every curve at rates evenly spaced on the log axis."""
    rates = np.concatenate([np.asarray(points["far"], dtype=float) for points in curves.values()] or [np.zeros(0)])
    rates = rates[rates > 0]
    marks = []
    for rate in np.geomspace(rates.min(), 1, STRIPS // 2) if len(rates) else []:
        lines = [f"FAR {rate:.2g}"]
        for name, points in curves.items():
            below = np.asarray(points["far"]) <= rate
            if below.any():
                lines.append(f"{name}: TAR {100 * float(np.asarray(points['tar'])[below].max()):.2f}%")
        marks.append((float(rate), "\n".join(lines)))
    return marks


def of_histogram(histogram: dict[str, Any]) -> list[Mark]:
    """The share of positive and negative pairs around a cosine."""
    edges = np.asarray(histogram["edges"], dtype=float)
    parts = {name: np.asarray(histogram[name], dtype=float) for name in ("positive", "negative")}
    marks = []
    for index, middle in enumerate((edges[1:] + edges[:-1]) / 2):
        shares = [f"{name}: {100 * counts[index] / max(1.0, counts.sum()):.3g}%" for name, counts in parts.items()]
        marks.append((float(middle), "\n".join([f"cosine {edges[index]:.3f} to {edges[index + 1]:.3f}", *shares])))
    return marks


def strips(figure: Figure, axes: Any, marks: list[Mark]) -> str:
    """The strips as SVG; each reaches half way to its neighbours. Call it after the figure was saved."""
    box, (width, height) = axes.get_position(), figure.get_size_inches() * POINT
    bottom, top = axes.get_ylim()
    places = axes.transData.transform([(x, (bottom * top) ** 0.5 if bottom > 0 else top) for x, _ in marks] or [(0, 1)])
    shares = axes.transAxes.inverted().transform(places)[:, 0]
    inside = [(share, words) for share, (_, words) in zip(shares, marks) if -1e-6 <= share <= 1 + 1e-6]
    if not inside:
        return ""
    centres = np.array([share for share, _ in inside])
    middles = (centres[1:] + centres[:-1]) / 2
    starts, stops = [0.0, *middles], [*middles, 1.0]
    y, tall = (1 - box.y1) * height, box.height * height
    drawn = []
    for start, stop, (_, words) in zip(starts, stops, inside):
        x, wide = (box.x0 + start * box.width) * width, max(0.0, stop - start) * box.width * width
        drawn.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{tall:.2f}"><title>{html.escape(words)}</title></rect>'
        )
    return f'<g class="hover">{"".join(drawn)}</g>'
