"""The report's figures as inline SVG. Colours are CSS variables of the page, so one file serves light and dark."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lvtrain.report.files import PhaseSpan

# placeholders that no figure uses otherwise, replaced by the page's variables after drawing
INK, MUTED, GRID, BLUE, TEAL, RED, BAND, FAINT = (f"#01010{digit}" for digit in range(1, 9))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    BLUE: "--blue",
    TEAL: "--teal",
    RED: "--red",
    BAND: "--band",
    FAINT: "--faint",
}
POINTS = 900

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.solid_joinstyle": "round",
}


def curve(
    steps: np.ndarray,
    values: np.ndarray,
    phases: list[PhaseSpan],
    *,
    color: str = BLUE,
    log: bool = False,
    deltas: bool = False,
    percent: bool = False,
    zero: bool = False,
    smooth: bool = True,
    beside: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
    name: str = "",
) -> str:
    """One quantity over steps, as a data URI. Phases are bands behind it; for cos^2, each phase's delta is a dashed line.

    `beside` holds steps and values of other runs by name, drawn thinner; `name` is then the name of this run.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        _phase_bands(axes, phases)
        others = [other for other in (BLUE, TEAL, RED, MUTED) if other != color]
        for (other, (x, y)), other_color in zip((beside or {}).items(), others):
            x, y, _, _ = _thinned(x, y)
            trend = _smooth(y) if smooth else None
            axes.plot(x, y if trend is None else trend, color=other_color, linewidth=1.1, label=other)
        drawn_steps, mean, low, high = _thinned(steps, values)
        if len(steps) > POINTS:
            axes.fill_between(drawn_steps, low, high, color=color, alpha=0.15, linewidth=0)
        trend = _smooth(mean) if smooth else None
        if trend is not None:
            axes.plot(drawn_steps, mean, color=color, alpha=0.3, linewidth=1)
        axes.plot(drawn_steps, mean if trend is None else trend, color=color, label=name)
        if beside:
            axes.legend(loc="best")
        if deltas:
            _deltas(axes, phases)
        if log and len(mean) and np.nanmin(mean) > 0 and np.nanmax(mean) / np.nanmin(mean) > 20:
            axes.set_yscale("log")
        elif zero:
            top = max(
                [
                    float(np.nanmax(values))
                    for values in [high, *(y for _, y in (beside or {}).values())]
                    if len(values)
                ],
                default=0.0,
            )
            axes.set_ylim(0, max(top * 1.08, 1e-12))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        _steps_axis(axes)
        return _svg(figure, axes)


def spread(
    steps: np.ndarray,
    mean: np.ndarray,
    deviation: np.ndarray,
    lowest: np.ndarray,
    highest: np.ndarray,
    phases: list[PhaseSpan],
) -> str:
    """A distribution over steps: its mean as a line, one standard deviation as a dark band, its range as a light one."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        _phase_bands(axes, phases)
        for low, high, alpha in ((lowest, highest, 0.12), (mean - deviation, mean + deviation, 0.22)):
            x, low, _, _ = _thinned(steps, low)
            axes.fill_between(x, low, _thinned(steps, high)[1], color=BLUE, alpha=alpha, linewidth=0)
        axes.plot(*_thinned(steps, mean)[:2], color=BLUE)
        axes.set_ylim(bottom=0)
        _steps_axis(axes)
        return _svg(figure, axes)


def roc(curves: dict[str, dict[str, Any]]) -> str:
    """TAR over FAR on a log axis; `curves` is name -> {"far": [...], "tar": [...]}, the last drawn strongest."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=3.1)
        colors = [BLUE, TEAL, RED, MUTED]
        lowest = 1.0
        for number, (name, points) in enumerate(curves.items()):
            far, tar = np.asarray(points["far"]), np.asarray(points["tar"])
            shown = far > 0
            if not shown.any():
                continue
            lowest = min(lowest, float(far[shown].min()))
            before = name.endswith("before")
            style = (
                {"color": MUTED, "linestyle": (0, (4, 3)), "linewidth": 1.2}
                if before
                else {"color": colors[number % 4]}
            )
            axes.step(far[shown], tar[shown], where="post", label=name, **style)
        axes.set_xscale("log")
        axes.set_xlim(lowest, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("false accept rate")
        axes.set_ylabel("true accept rate")
        axes.legend(loc="best")
        return _svg(figure, axes)


def histogram(
    histogram: dict[str, Any], means: tuple[float, float] | None = None, *, limit: tuple[float, float] = (-1, 1)
) -> str:
    """Cosines of positive and negative pairs, each as a share of its pairs, with their means."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=2.5)
        edges = np.asarray(histogram["edges"])
        for name, color in (("negative", RED), ("positive", TEAL)):
            counts = np.asarray(histogram[name], dtype=float)
            share = counts / max(1.0, counts.sum())
            axes.stairs(share, edges, fill=True, color=color, alpha=0.28)
            axes.stairs(share, edges, color=color, linewidth=1.3, label=f"{name} pairs")
        for mean, color in zip(means or (), (TEAL, RED)):
            axes.axvline(mean, color=color, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_xlim(*limit)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.set_xlabel("cosine of the pair")
        axes.legend(loc="upper left")
        return _svg(figure, axes)


def span(histograms: list[dict[str, Any]]) -> tuple[float, float]:
    """A range of cosines that fits several histograms, so that before and after can be compared."""
    low, high = 1.0, -1.0
    for one in histograms:
        edges, counts = np.asarray(one["edges"]), np.asarray(one["positive"]) + np.asarray(one["negative"])
        used = np.flatnonzero(counts)
        if len(used):
            low, high = min(low, edges[used[0]]), max(high, edges[used[-1] + 1])
    return (-1.0, 1.0) if low >= high else (max(-1.0, low - 0.05), min(1.0, high + 0.05))


def accuracy(steps: list[int], series: dict[str, list[float]]) -> str:
    """Accuracy of every benchmark at every evaluation."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=3.1)
        for number, (name, values) in enumerate(series.items()):
            axes.plot(steps, values, marker="o", markersize=3.5, color=(BLUE, TEAL, RED, MUTED)[number % 4], label=name)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.legend(loc="lower right")
        _steps_axis(axes)
        return _svg(figure, axes)


# ------------------------------------------------------------------------------------------------------------------ parts


def _axes(height: float = 2.5) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.6, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _phase_bands(axes: Any, phases: list[PhaseSpan]) -> None:
    last = max((phase.stop for phase in phases), default=0)
    for number, phase in enumerate(phases):
        if number % 2 == 0:
            axes.axvspan(phase.start, phase.stop, color=BAND, linewidth=0, zorder=0)
        if number:
            axes.axvline(phase.start, color=MUTED, linewidth=0.8, alpha=0.6)
        # a name that does not fit into its band is only in the table of phases
        if last and (phase.stop - phase.start) / last > 0.011 * len(phase.name):
            middle = (phase.start + phase.stop) / 2
            axes.text(
                middle, 1.02, phase.name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=MUTED
            )


def _deltas(axes: Any, phases: list[PhaseSpan]) -> None:
    end = max((phase.stop for phase in phases), default=1)
    for number, phase in enumerate(phases, start=1):
        if phase.delta is None:
            continue
        axes.plot([phase.start, end], [phase.delta, phase.delta], color=RED, linewidth=1, linestyle=(0, (4, 3)))
        label = f"δ{number} = {phase.delta:g}"
        axes.annotate(label, (end, phase.delta), (0, -3), textcoords="offset points", color=RED, ha="right", va="top")


def _steps_axis(axes: Any) -> None:
    axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_xlabel("step")


def _short(value: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest value of at most POINTS parts of the curve."""
    if len(steps) <= POINTS:
        return steps, values, values, values
    pieces = np.array_split(np.arange(len(steps)), POINTS)
    columns = [(steps[p].mean(), values[p].mean(), values[p].min(), values[p].max()) for p in pieces]
    first, mean, low, high = np.array(columns).T
    return first, mean, low, high


def _smooth(values: np.ndarray) -> np.ndarray | None:
    """A centred running mean over a fortieth of the curve; None for a curve too short to need one."""
    width = len(values) // 40 * 2 + 1
    if width < 3:
        return None
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def _svg(figure: Figure, axes: Any) -> str:
    buffer = io.StringIO()
    # a fixed salt: the same run gives the same file
    with matplotlib.rc_context({"svg.hashsalt": "lvtrain"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # text follows the page's font; the figure scales with its card
    text = re.sub(r"font: ([0-9.]+)px [^;\"]+", r"font-size: \1px; font-family: inherit", text)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" role="img" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )
