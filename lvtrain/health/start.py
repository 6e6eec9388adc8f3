"""Faults that the recipe and the dataset's labels show before the first step."""

from __future__ import annotations

import math

import numpy as np

from lvtrain.data import ShardDataset
from lvtrain.health.causes import Finding, finding
from lvtrain.recipe.base import Duration
from lvtrain.recipe.sections import Recipe

_CHUNK = 1 << 20  # labels that are counted at once
_RATES = {"adamw": (3e-5, 5e-3), "sgd": (2e-3, 1.0)}  # published from-scratch runs: 1e-4 to 1e-3, and 0.02 to 0.4
_FORGETS = 500  # steps; published runs have 10,000 (AdamW 1e-3, 0.1) and 20,000 (SGD 0.1, 5e-4)
_PROBABILITY = 0.9  # that the scale must allow for a sample's own class


def check_recipe(recipe: Recipe, *, classes: int, images: int, has_attention: bool) -> list[Finding]:
    """What the recipe shows.

    Args:
        recipe: of the run.
        classes: identities of the dataset.
        images: of the dataset.
        has_attention: whether the backbone is a transformer.
    """
    found: list[Finding | None] = [_rate(recipe), _decay(recipe), _average(recipe, images)]
    if has_attention:
        found.append(_warm_up(recipe))
    if recipe.classifier is not None:
        found += [_scale(recipe, classes), _sampling(recipe, classes)]
    return [each for each in found if each is not None]


def _peak(recipe: Recipe) -> float:
    return max(recipe.optimizer.peak_for(phase.global_batch) for phase in recipe.phases)


def _rate(recipe: Recipe) -> Finding | None:
    peak, name = _peak(recipe), recipe.optimizer.name
    low, high = _RATES.get(name, (0.0, math.inf))
    if peak > high:
        return finding("rate high", rate=peak, usual=f"usual with {name}: at most {high:g}")
    if peak < low and recipe.init_from is None:
        return finding("rate low", rate=peak, usual=f"usual with {name} from scratch: at least {low:g}")
    return None


def _decay(recipe: Recipe) -> Finding | None:
    """A weight forgets what it was in 1 / (rate x decay) steps (Wang and Aitchison, arXiv 2405.13698)."""
    peak, (_, high) = _peak(recipe), _RATES.get(recipe.optimizer.name, (0.0, math.inf))
    each = min(peak, high) * recipe.optimizer.weight_decay  # a rate that is too high is another cause
    steps = 1 / each if each else math.inf
    return finding("decay", decay=recipe.optimizer.weight_decay, steps=steps) if steps < _FORGETS else None


def _warm_up(recipe: Recipe) -> Finding | None:
    """Transformers under Adam need one from 3e-4 on; every published ViT recipe has 3 epochs or more."""
    late = recipe.init_from is not None or recipe.optimizer.name == "sgd" or _peak(recipe) < 3e-4
    return None if late or recipe.schedule.warmup.amount else finding("warm-up", rate=_peak(recipe))


def _steps(duration: Duration, recipe: Recipe, images: int) -> float:
    batch = recipe.phases[0].global_batch
    return duration.samples(global_batch=batch, samples_per_epoch=images) / batch


def _average(recipe: Recipe, images: int) -> Finding | None:
    """After n steps the average still holds decay^n of the weights it began with."""
    if recipe.ema is None:
        return None
    total = _steps(recipe.schedule.total, recipe, images)
    every = recipe.evaluation.every
    first = min(total, _steps(every, recipe, images)) if every and recipe.evaluation.benchmarks else total
    share = recipe.ema.decay**first
    return finding("ema", share=share, step=first) if share > 0.1 else None


def _scale(recipe: Recipe, classes: int) -> Finding | None:
    """The least scale for a probability P of the own class (Wang et al., CosFace, eq. 6)."""
    assert recipe.classifier is not None
    count, scale = max(2, classes), recipe.classifier.margin.scale
    least = (count - 1) / count * math.log((count - 1) * _PROBABILITY / (1 - _PROBABILITY))
    return finding("scale", scale=scale, least=least) if scale < least else None


def _sampling(recipe: Recipe, classes: int) -> Finding | None:
    for phase in recipe.phases:
        if phase.sample_rate == 1.0:
            continue
        batch = phase.global_batch
        positives = -classes * math.expm1(batch * math.log1p(-1 / classes)) if classes > 1 else 1.0
        taking_part = phase.sample_rate * classes
        # the class centres that no image of the batch has: with fewer than a tenth more there is next to no negative
        if taking_part < 1.1 * positives or phase.sample_rate < 0.02:
            return finding("sampling", rate=phase.sample_rate, classes=taking_part, positives=positives)
    return None


def count_images(dataset: ShardDataset) -> np.ndarray:
    """Images of each identity, int64 [num_classes]. Takes 0.3 s for 42 million labels."""
    counts = np.zeros(dataset.num_classes, dtype=np.int64)
    for start in range(0, len(dataset), _CHUNK):
        labels = dataset.labels(np.arange(start, min(start + _CHUNK, len(dataset))))
        counts += np.bincount(labels, minlength=dataset.num_classes)
    return counts


def check_counts(counts: np.ndarray) -> list[Finding]:
    """What the images of each identity, int64 [C], show."""
    empty = int((counts == 0).sum())
    too_many = empty > 0.01 * len(counts)  # packing numbers only identities with an image
    return [finding("classes", empty=empty, classes=len(counts))] if too_many else []
