"""Which signs name which cause. A threshold has its reason beside it.

Signs are measured in `batch_signs`, `kinds`, `probes` and `served`; `causes` is the table of what can be named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lvtrain.health.causes import Finding, finding


@dataclass
class Signs:
    """Everything measured up to a log line.

    Attributes:
        ranks: signs since the last log line, of each rank.
        total: sums of pairs since the start, over all ranks.
        steps: since the last log line.
        step: of the run.
        epoch: of the run.
        facts: of the recipe: scale, optimizer, weight_decay, sample_rate, grey (share that the augmentation makes
            grey), keeps_identity (whether a view shows most of the face), frozen, weighs (whether the loss is the margin
            softmax alone), images, global_batch.
    """

    ranks: list[dict[str, Any]]
    total: dict[str, float]
    steps: int
    step: int
    epoch: float
    facts: dict[str, Any] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """Over the ranks that have it; NaN if none has."""
        values = [rank[name] for rank in self.ranks if not math.isnan(rank.get(name, math.nan))]
        return sum(values) / len(values) if values else math.nan

    def sum(self, name: str) -> float:
        return sum(rank.get(name, 0.0) for rank in self.ranks)


_USUAL = "measured by how far the weights move; the recipe has {rate:.2g}"

# Every rule answers None, or the values of its cause. A comparison with NaN (not measured) is false.
Rule = Callable[[Signs], dict[str, Any] | None]


def _normalisation(signs: Signs) -> dict[str, Any] | None:
    """The loader gives [-1, 1], and 16 faces always have a dark pixel below the middle grey."""
    low, high = min(r.get("lowest", -1.0) for r in signs.ranks), max(r.get("highest", 1.0) for r in signs.ranks)
    return {"low": low, "high": high} if high > 1.05 or low < -1.05 or low > -0.05 else None


def _bgr(signs: Signs) -> dict[str, Any] | None:
    """Colours as in the file: `swapped` is below -1 in the right order, above 1 in the other.

    Files: skin of every tone reflects more red than blue. Says nothing of grey sets, or under strongly coloured light.
    """
    if signs.mean("swapped") > 0.3:
        return {"where": "between the files and the network"}
    coloured = signs.sum("coloured")
    return {"where": "in the files"} if coloured >= 24 and signs.sum("redder") / coloured < -0.05 else None


def _constant(signs: Signs) -> dict[str, Any] | None:
    """No photograph is one colour; one in twenty is more than a stray."""
    share = signs.sum("constant") / max(1.0, signs.sum("images"))
    return {"share": share} if share > 0.05 else None


def _colourless(signs: Signs) -> dict[str, Any] | None:
    """Sets that are all grey are healthy, and so is what the augmentation makes grey."""
    share = signs.sum("grey") / max(1.0, signs.sum("images"))
    return {"share": share} if share - signs.facts["grey"] > 0.3 and share < 0.95 else None


def _copies(signs: Signs) -> dict[str, Any] | None:
    """A small dataset has copies where a batch crosses the end of an epoch."""
    if signs.facts["images"] < 4 * signs.facts["global_batch"]:
        return None
    share = (signs.sum("copies") - signs.sum("constant")) / max(1.0, signs.sum("images"))
    share = max(share, signs.sum("file_copies") / max(1.0, signs.sum("files")))
    return {"share": share} if share > 0.1 else None


def _duplicates(signs: Signs) -> dict[str, Any] | None:
    """Cleaned sets have below 1 in 1,000."""
    across, files = signs.sum("file_copies_across"), signs.sum("files")
    return {"share": across / files} if across >= 5 and across > 0.005 * files else None


def _part(signs: Signs) -> dict[str, Any] | None:
    """The order is a pure function, so that every rank knows what it must get."""
    for number, rank in enumerate(signs.ranks):
        if rank.get("misplaced", 0):
            return {"rank": number, "share": rank["misplaced"] / rank["seen"]}
    return None


def _labels(signs: Signs) -> dict[str, Any] | None:
    """Thumbnails of one identity's images are more alike than others', by 0.15 or more in sets of photographs.

    Nothing need be learned for that. The rule needs enough pairs to exclude 0.06 at 2.6 standard errors. Where the
    augmentation destroys the images, it does not apply. A served label that differs from the index names the cause at once.
    """
    if signs.sum("mislabelled") > 0:
        return {"why": "the loader serves labels that differ from the dataset's index"}
    if signs.mean("likeness") < 0.5 or not signs.facts["keeps_identity"]:
        return None
    total = signs.total
    same, other = total["same_pairs"], total["other_pairs"]
    if same < 200 or other < 200:
        return None
    difference = total["same_pixels"] / same - total["other_pixels"] / other
    error = math.sqrt(
        (total["same_pixels_square"] / same - (total["same_pixels"] / same) ** 2) / same
        + (total["other_pixels_square"] / other - (total["other_pixels"] / other) ** 2) / other
    )
    alike = "two images of one identity are no more alike than two images of different identities"
    return {"why": alike} if difference + 2.6 * error < 0.06 else None


def _centres(signs: Signs) -> list[tuple[float, float]]:
    """Cosines of each watched class's mean embedding to its own class centre, and to the nearest other one."""
    columns = [[rank.get(name, []) for rank in signs.ranks] for name in ("own", "other")]
    pairs = [(max(own), max(other)) for own, other in zip(*(zip(*each) for each in columns))]
    return [(own, other) for own, other in pairs if own > 0]


def _knows_identities(signs: Signs) -> bool:
    """Whether images of a class are alike, near their class's centre, and far from most others.

    Embeddings speak of identities only then. They do not on a plateau, nor at the start of a fine-tuning, whose class
    means are near their centre while the images of a class are not alike (cosine 0.1).
    """
    pairs = _centres(signs)
    if len(pairs) < 16 or not signs.mean("within") > 0.4:
        return False
    return median(own for own, _ in pairs) > 0.6 and median(other / own for own, other in pairs) < 0.85


def _collapse(signs: Signs) -> dict[str, Any] | None:
    """Most classes are near their own centre, and as near to another one. So ArcFace's loss falls without learning."""
    pairs = _centres(signs)
    if len(pairs) < 16:
        return None
    near = median(own for own, _ in pairs)
    return {"cosine": near} if near > 0.6 and median(other / own for own, other in pairs) > 0.95 else None


def _split(signs: Signs) -> dict[str, Any] | None:
    """Another class centre is nearly as near to a class's embeddings as its own.

    Once the network knows its identities (cosine 0.6 to their own centre, most other centres far), below 8% of healthy
    classes have another centre 0.85 as near, 0% soon after, and half of those that are one identity with another.
    """
    if not _knows_identities(signs):
        return None
    pairs = _centres(signs)
    share = sum(other > 0.85 * own for own, other in pairs) / len(pairs)
    return {"share": share} if share > 0.15 else None


def _merged(signs: Signs) -> dict[str, Any] | None:
    """Embeddings of a class are two groups, once the network knows its identities.

    Then below 4% of healthy classes do, and a quarter of those with two identities.
    """
    share = signs.mean("apart")
    return {"share": share} if share > 0.1 and _knows_identities(signs) else None


def _augmentation(signs: Signs) -> dict[str, Any] | None:
    """Thumbnails of an image and its file, mirrored or not: 1 with flips, 0.5 and more with strong sets."""
    likeness, contrast = signs.mean("likeness"), signs.mean("contrast")
    lost = signs.facts["keeps_identity"] and (likeness < 0.3 or contrast < 0.2)
    return {"likeness": likeness, "contrast": contrast} if lost else None


def _rate_high(signs: Signs) -> dict[str, Any] | None:
    """A step of Adam is at most about the rate for each weight (0.2 to 0.5 in a healthy run)."""
    stride, rate = signs.mean("stride"), signs.facts["rate"]
    adam = signs.facts["optimizer"] == "adamw"
    return {"rate": stride * rate, "usual": _USUAL.format(rate=rate)} if adam and stride > 2 else None


def _rate_low(signs: Signs) -> dict[str, Any] | None:
    """Adam's steps are never below 0.03 of the rate, as long as there is a gradient."""
    stride, rate = signs.mean("stride"), signs.facts["rate"]
    adam = signs.facts["optimizer"] == "adamw" and signs.facts["layer_decay"] is None
    return {"rate": stride * rate, "usual": _USUAL.format(rate=rate)} if adam and 0 < stride < 0.03 else None


def _decay(signs: Signs) -> dict[str, Any] | None:
    """What weights lose along themselves in a step over the rate is the decay that acts; gradients add noise of 0.5."""
    acts, asked = signs.mean("shrink"), signs.facts["weight_decay"]
    steps = 1 / max(acts * signs.facts["rate"], 1e-12)
    adam = signs.facts["optimizer"] == "adamw"
    return {"decay": acts, "steps": steps} if adam and acts > 3 + 5 * asked else None


def _gradient(signs: Signs) -> dict[str, Any] | None:
    """Two bounds on the gradient, whatever the number of ranks.

    The norm of a mean is at most the mean of the norms, so the ranks' own gradients bound the averaged one. And with m
    images in a step the softmax's gradient of an embedding x is at most 2 s / (m |x|); at first it is 1.2 s / (m |x|).
    """
    factor = signs.mean("grad_norm") / max(signs.mean("own_norm"), 1e-30)
    if len(signs.ranks) > 1 and factor > 1.02:
        return {"factor": factor}
    pull = signs.mean("pull") / signs.facts["scale"] if signs.facts["weighs"] else math.nan
    return {"factor": pull / 1.2} if pull > 2.0 else None


def _frozen(signs: Signs) -> dict[str, Any] | None:
    """Everything that is trained moves in every step, by decay if by nothing else."""
    moved = signs.mean("moved")
    return {"share": 1 - moved} if moved < 0.7 and not signs.facts["frozen"] else None


def _dead(signs: Signs) -> dict[str, Any] | None:
    """Below 5% of a layer in ViTs and IResNets; a third in the small squeeze layers of an untrained MobileNet."""
    share = signs.mean("dead")
    return {"share": share} if share > 0.5 else None


def _rows(signs: Signs) -> dict[str, Any] | None:
    """A class is sampled in a step with probability r."""
    moved, expected = signs.mean("rows_moved"), 1 - (1 - signs.facts["sample_rate"]) ** signs.steps
    return {"share": 1 - moved} if signs.steps >= 5 and moved < 0.7 * expected else None


RULES: dict[str, Rule] = {
    "normalisation": _normalisation,
    "bgr": _bgr,
    "constant": _constant,
    "colourless": _colourless,
    "copies": _copies,
    "duplicates": _duplicates,
    "part": _part,
    "augmentation": _augmentation,
    "labels": _labels,
    "collapse": _collapse,
    "split": _split,
    "merged": _merged,
    "rate high": _rate_high,
    "rate low": _rate_low,
    "decay": _decay,
    "gradient": _gradient,
    "frozen": _frozen,
    "dead": _dead,
    "rows": _rows,
}


def name_causes(signs: Signs) -> list[Finding]:
    """The causes that the signs name, most direct first."""
    found = {name: rule(signs) for name, rule in RULES.items()}
    return [finding(name, **values) for name, values in found.items() if values is not None]
