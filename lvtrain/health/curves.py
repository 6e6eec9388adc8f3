"""Reference curves of recipe cards, the band around them, and which one a run may be held against.

A curve is data: `lvtrain/recipes/curves/NAME.json`, named after its card. A run has no key that names its card. It is
held against a card that trains the same network by the same method and margin on the same data; what else differs is
listed, because it may move the curve.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.files.reading import parse_json
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe

FOLDER = Path(recipes.__file__).parents[1] / "recipes" / "curves"
EARLIER_OR_LATER = 0.25  # share of the time by which a run may be earlier or later, and at most ...
AT_MOST = 0.5  # epochs
HIGHER_OR_LOWER = 0.05  # share of the loss
_GRID = 50  # points of an epoch over which its mean band is taken

# a run whose values differ here trains something else
_SAME = ("method.name", "backbone.name", "classifier.margin.name", "classifier.margin.scale", "classifier.margin.m")
# values that do not move the curve, or hardly; the rest is listed where it differs
_FREE = (
    *("name", "runs", "seed", "deterministic", "data", "backbone.compile", "backbone.checkpoint_blocks"),
    *("classifier.numerics", "checkpoint", "evaluation", "logging", "safety", "ema", "optimizer.precision"),
    *("method.window", "method.distill.teacher"),
)


@dataclass(frozen=True)
class PhaseEnds:
    """When a phase is expected to reach its delta: epochs from the start of the run."""

    earliest: float
    latest: float


@dataclass(frozen=True)
class Curve:
    """The loss of a card's run or runs over epochs.

    Attributes:
        name: of the card.
        source: where the figures are from.
        runs: how many runs they are of.
        epochs: float64 [K], rising.
        low: float64 [K], the lowest loss of the runs there; a published log is one run.
        high: the highest.
        phase_ends: by name of the phase.
        differs: keys of the card that the log was trained with otherwise, and their values there.
    """

    name: str
    source: str
    runs: int
    epochs: np.ndarray
    low: np.ndarray
    high: np.ndarray
    phase_ends: dict[str, PhaseEnds] = field(default_factory=dict)
    differs: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> float:
        """The epoch at which the curve ends; 0 where it has no losses."""
        return float(self.epochs[-1]) if len(self.epochs) else 0.0

    def band(self, epoch: float) -> tuple[float, float]:
        """Lowest and highest loss there of a run that is a little earlier or later, higher or lower."""
        shift = min(EARLIER_OR_LATER * epoch, AT_MOST)
        start, stop = epoch - shift, min(epoch + shift, self.last)
        inside = (self.epochs > start) & (self.epochs < stop)
        low = [*self.low[inside], *np.interp([start, stop], self.epochs, self.low)]
        high = [*self.high[inside], *np.interp([start, stop], self.epochs, self.high)]
        return float(min(low)) * (1 - HIGHER_OR_LOWER), float(max(high)) * (1 + HIGHER_OR_LOWER)

    def mean_band(self, start: float, stop: float) -> tuple[float, float]:
        """The band of a mean loss from epoch `start` to `stop`."""
        places = start + (np.arange(_GRID) + 0.5) / _GRID * (stop - start)
        low, high = np.mean([self.band(place) for place in places], axis=0)
        return float(low), float(high)


def load_curve(path: Path) -> Curve:
    """Reads a file of `lvtrain/recipes/curves`."""
    values = parse_json(path.read_text())
    ends = {name: PhaseEnds(*found) for name, found in values.get("phase_ends", {}).items()}
    if "loss_by_seed" in values:  # ours, by epoch
        losses = np.array(values["loss_by_seed"])
        points, low, high = np.array(values["epochs"]), losses.min(axis=0), losses.max(axis=0)
    elif "loss_by_epoch" in values:
        found = _points(values)
        points, low = np.array(found).T
        high = low
    else:
        points = low = high = np.zeros(0)
    runs = len(values.get("loss_by_seed", [[]]))
    return Curve(path.stem, values["source"], runs, points, low, high, ends, values.get("differs", {}))


def _points(values: dict[str, Any]) -> list[tuple[float, float]]:
    """Epochs and losses of a published log: its first line, where it fell below a loss, and the middles of its epochs."""
    means = values["loss_by_epoch"]
    per_epoch = values["steps"] / len(means)
    found = {0.0: values["first"]["loss"], values["first"]["step"] / per_epoch: values["first"]["loss"]}
    found |= {number + 0.5: mean for number, mean in enumerate(means)}
    found |= {step / per_epoch: float(loss) for loss, step in values["step_below_loss"].items()}
    return sorted((*found.items(), (float(len(means)), means[-1])))


@dataclass(frozen=True)
class Reference:
    """The curve that a run is held against.

    Attributes:
        curve: of the card.
        differs: keys in which the run differs from the curve's: (the run's value, the curve's).
    """

    curve: Curve
    differs: dict[str, tuple[Any, Any]]

    @property
    def text(self) -> str:
        """One line."""
        curve = self.curve
        of = f"{curve.runs} runs" if curve.runs > 1 else "1 run"
        said = f"reference curve: {curve.name} ({curve.source}; {of})"
        if not self.differs:
            return said
        listed = [f"{key} {own} (the curve: {theirs})" for key, (own, theirs) in list(self.differs.items())[:4]]
        more = f" and {len(self.differs) - 4} more" if len(self.differs) > 4 else ""
        return f"{said}; this run differs in {', '.join(listed)}{more}"


def find_reference(recipe: Recipe, *, num_classes: int, num_samples: int) -> Reference | None:
    """The curve of the card that `recipe` follows, whatever its name; None where there is none.

    Losses of different sample rates do not compare, so a curve of another one is none.
    """
    own = _flat(recipe.model_dump(mode="json"))
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        name, yaml = path.stem, FOLDER.parent / f"{path.stem}.yaml"
        if not yaml.is_file() or recipe.backbone.name not in yaml.read_text():  # reading a recipe takes 0.1 s
            continue
        card, curve = _card(name), load_curve(path)
        if any(own.get(key) != card.get(key) for key in _SAME):
            continue
        sizes = (num_classes, card["data.num_classes"]), (num_samples, card["data.num_samples"])
        if any(theirs is None or abs(mine / theirs - 1) > 0.02 for mine, theirs in sizes):
            continue
        theirs = card | curve.differs
        differs = {
            key: (own.get(key), theirs.get(key))
            for key in sorted(own.keys() | theirs.keys())
            if own.get(key) != theirs.get(key) and not _is_free(key)
        }
        if not any(key.endswith(".sample_rate") for key in differs):
            found.append((len(differs), name, Reference(curve, differs)))
    return min(found, key=lambda one: one[:2])[2] if found else None


@cache
def _card(name: str) -> dict[str, Any]:
    """The flat values of a card, with the sizes of its data, which its curve states where its recipe does not."""
    card = _flat(recipes.load(FOLDER.parent / f"{name}.yaml").model_dump(mode="json"))
    sizes = parse_json((FOLDER / f"{name}.json").read_text()).get("data", {})
    return card | {f"data.{key}": value for key, value in sizes.items()}


def _is_free(key: str) -> bool:
    if key.endswith((".micro_batches", ".end.at_most", ".end.until")):
        return True
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = [(str(number), each) for number, each in enumerate(value)]
    else:
        return {prefix: value}
    return {name: leaf for key, each in items for name, leaf in _flat(each, f"{prefix}.{key}".lstrip(".")).items()}
