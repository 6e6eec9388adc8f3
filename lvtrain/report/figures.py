"""The report's figures as inline SVG. Colours are CSS variables of the page, so one file serves light and dark."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lvtrain.report import hover
from lvtrain.report.files import PhaseSpan

# placeholders that no figure uses otherwise, replaced by the page's variables after drawing
INK, MUTED, GRID, BLUE, TEAL, RED, BAND, FAINT, VIOLET = (f"#01010{digit}" for digit in range(1, 10))
RUNS = (BLUE, TEAL, RED, VIOLET)  # the run, and those beside it: each keeps its colour in every figure
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    BLUE: "--blue",
    TEAL: "--teal",
    RED: "--red",
    BAND: "--band",
    FAINT: "--faint",
    VIOLET: "--violet",
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
    log: bool = False,
    deltas: bool = False,
    percent: bool = False,
    zero: bool = False,
    smooth: bool = True,
    beside: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
    name: str = "",
    reference: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> str:
    """One quantity over steps, as inline SVG. Phases are bands behind it; for cos^2, each phase's delta is a dashed line.

    `beside` holds steps and values of other runs by name, drawn thinner, no steps for one that has none; `name` is the
    name of this run. `reference`: steps, lowest and highest value of the band of its card.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        _phase_bands(axes, phases)
        if reference is not None:
            axes.fill_between(*reference, color=MUTED, alpha=0.22, linewidth=0, label="band of the card")
        for (other, (x, y)), color in zip((beside or {}).items(), RUNS[1:]):
            if len(x) < 2:
                continue
            x, y, _, _ = _thinned(x, y)
            trend = _smooth(y) if smooth else None
            axes.plot(x, y if trend is None else trend, color=color, linewidth=1.1, label=other)
        drawn_steps, mean, low, high = _thinned(steps, values)
        if len(steps) > POINTS:
            axes.fill_between(drawn_steps, low, high, color=BLUE, alpha=0.15, linewidth=0)
        trend = _smooth(mean) if smooth else None
        if trend is not None:
            axes.plot(drawn_steps, mean, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(drawn_steps, mean if trend is None else trend, color=BLUE, label=name)
        if beside or reference is not None:
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles[::-1], labels[::-1], loc="best")  # drawn last, named first
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
        shown = {name or "value": (steps, values), **(beside or {})}
        if reference is not None:
            shown |= {"band from": reference[:2], "to": reference[::2]}
        return _svg(figure, axes, hover.over_steps(shown, percent=percent))


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
        shown = {"mean": mean, "deviation": deviation, "lowest": lowest, "highest": highest}
        return _svg(figure, axes, hover.over_steps({name: (steps, values) for name, values in shown.items()}))


def roc(curves: dict[str, dict[str, Any]]) -> str:
    """TAR over FAR on a log axis; `curves` is name -> {"far": [...], "tar": [...]}, the last drawn strongest."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=3.1)
        lowest = 1.0
        for name, points in curves.items():
            far, tar = np.asarray(points["far"]), np.asarray(points["tar"])
            shown = far > 0
            if not shown.any():
                continue
            lowest = min(lowest, float(far[shown].min()))
            before = name.endswith("before")
            style = {"color": MUTED, "linestyle": (0, (4, 3)), "linewidth": 1.2} if before else {"color": BLUE}
            axes.step(far[shown], tar[shown], where="post", label=name, **style)
        axes.set_xscale("log")
        axes.set_xlim(lowest, 1)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # a power's exponent is too small
        axes.set_xlabel("false accept rate")
        axes.legend(loc="best")
        return _svg(figure, axes, hover.of_roc(curves))


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
        return _svg(figure, axes, hover.of_histogram(histogram))


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
            style = {"marker": "osD^"[number % 4], "linestyle": ("-", "--", ":", "-.")[number % 4]}
            axes.plot(steps, values, markersize=3.5, color=BLUE, label=name, **style)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.legend(loc="lower right")
        _steps_axis(axes)
        shown = {name: (np.asarray(steps), np.asarray(values)) for name, values in series.items()}
        return _svg(figure, axes, hover.over_steps(shown, percent=True))


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
        axes.plot([phase.start, end], [phase.delta, phase.delta], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        label = f"δ{number} = {phase.delta:g}"
        axes.annotate(label, (end, phase.delta), (0, -3), textcoords="offset points", color=MUTED, ha="right", va="top")


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


def _svg(figure: Figure, axes: Any, marks: list[hover.Mark]) -> str:
    buffer = io.StringIO()
    # a fixed salt: the same run gives the same file
    with matplotlib.rc_context({"svg.hashsalt": "lvtrain"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("</svg>", hover.strips(figure, axes, marks) + "</svg>")
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
