"""Faults of a training, each as a change of the training itself: a recipe's key, the data, or a patched function.

`tools/health.py` trains with each of them. The health check itself is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch

from lvtrain import randomness

Patch = Callable[[int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """One way in which a training is wrong.

    Attributes:
        causes: names of the check's rules, of which one must be named.
        overrides: of the recipe.
        change: patches the training; gets the seed.
        ranks: of the run.
        data: which form of the images: `plain` or `bgr`.
    """

    causes: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    change: Callable[[int], Any] | None = None
    ranks: int = 1
    data: str = "plain"


@contextmanager
def _replaced(target: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """`target.name` is `wrap(original)` inside."""
    with patch.object(target, name, wrap(getattr(target, name))):
        yield


# ------------------------------------------------------------------------------------------------------------- margin


def _margin(**changes: float) -> Callable[[int], Any]:
    def change(seed: int) -> Any:
        from lvtrain.methods import heads

        def wrap(create: Any) -> Any:
            def wrong(section: Any) -> Any:
                margin = create(section)
                if "scale" in changes:
                    margin.scale = changes["scale"]
                if "m" in changes:
                    margin.settings = margin.settings.model_copy(update={"m": changes["m"]})
                return margin

            return wrong

        return _replaced(heads, "create_margin", wrap)

    return change


# --------------------------------------------------------------------------------------------------------------- labels


def _labels(new: Callable[[np.ndarray, Callable[[np.ndarray], np.ndarray], int, int], np.ndarray], classes: Any = None):
    """Labels become `new(ids, old labels of ids, images, seed)`; the number of classes `classes(old number)`."""

    @contextmanager
    def change(seed: int) -> Iterator[None]:
        from lvtrain.data import ShardDataset

        old = ShardDataset.labels
        count: Any = ShardDataset.num_classes

        def labels(self: Any, ids: np.ndarray) -> np.ndarray:
            return new(np.asarray(ids), lambda some: old(self, some), len(self), seed)

        with ExitStack() as stack:
            stack.enter_context(patch.object(ShardDataset, "labels", labels))
            if classes:
                number = property(lambda self: classes(count.fget(self)))
                stack.enter_context(patch.object(ShardDataset, "num_classes", number))
            yield

    return change


def _shuffled(ids: np.ndarray, old: Any, count: int, seed: int) -> np.ndarray:
    return old(np.random.default_rng(seed).permutation(count)[ids])


def _shifted(ids: np.ndarray, old: Any, count: int, seed: int) -> np.ndarray:
    return old((ids + count // 8) % count)  # eight shards


def _split(ids: np.ndarray, old: Any, count: int, seed: int) -> np.ndarray:
    """Every second identity has two labels."""
    labels, everyone = old(ids), 1 + int(old(np.arange(count)).max())
    half = randomness.uniform(seed, "fault/split", ids) < 0.5
    return np.where(half & (labels % 2 == 0), everyone + labels // 2, labels)


def _merged(ids: np.ndarray, old: Any, count: int, seed: int) -> np.ndarray:
    """Every second label has two identities."""
    labels = old(ids)
    place = labels % 3
    return labels // 3 * 2 + np.minimum(place, 1)


# --------------------------------------------------------------------------------------------------------------- images


def _images(new: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[int], Any]:
    """The served views become `new(images, seed)`."""

    def change(seed: int) -> Any:
        from lvtrain.data.loader import Loader

        def wrap(finish: Any) -> Any:
            def wrong(self: Any, decoded: Any) -> Any:
                ready = finish(self, decoded)
                for view in ready.batch.views.values():
                    view.copy_(new(view.clone(), seed))
                return ready

            return wrong

        return _replaced(Loader, "_finish", wrap)

    return change


def _half(images: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    images[::2] = other[::2] if len(other) == len(images) else other
    return images


_FIXED: dict[tuple[int, ...], torch.Tensor] = {}


def _one_image(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Every second image is the first image that was ever served."""
    first = _FIXED.setdefault((seed, *images.shape[1:]), images[0].clone())
    images[::2] = first
    return images


def _crumb(images: torch.Tensor, seed: int) -> torch.Tensor:
    """A crop of a hundredth of the area, at a random place."""
    size = images.shape[-1]
    side = max(2, size // 10)
    x, y = np.random.default_rng(int(images.abs().sum().item() * 1000) % 2**31).integers(0, size - side, 2)
    return torch.nn.functional.interpolate(images[..., y : y + side, x : x + side], size=(size, size), mode="bilinear")


def _blurred(images: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images, 1).expand_as(images).clone() + 0.02 * images


def _erased(images: torch.Tensor, seed: int) -> torch.Tensor:
    size = images.shape[-1]
    images[..., size // 20 :, :] = 0.0
    return images


@contextmanager
def _duplicates(seed: int) -> Iterator[None]:
    """A tenth of the samples have the file of another one, of another identity."""
    from lvtrain.data import ShardDataset

    records = ShardDataset.records

    def wrong(self: Any, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        copied = randomness.uniform(seed, "fault/copies", ids) < 0.1
        return records(self, np.where(copied, (ids * 7 + 13) % len(self), ids))

    def right(self: Any, ids: np.ndarray) -> np.ndarray:
        return self._labels(records(self, ids))

    with patch.object(ShardDataset, "records", wrong), patch.object(ShardDataset, "labels", right):
        yield


# ---------------------------------------------------------------------------------------------------------- the machine


def _step(**factors: float) -> Callable[[int], Any]:
    """The engine steps with other rates than the trainer asks for."""

    def change(seed: int) -> Any:
        from lvtrain.engine.engine import Engine

        def wrap(step: Any) -> Any:
            def wrong(self: Any, lr: float, loss: Any, *, weight_decay: float | None = None) -> Any:
                decay = None if weight_decay is None else weight_decay * factors.get("weight_decay", 1.0)
                return step(self, lr * factors.get("lr", 1.0), loss, weight_decay=decay)

            return wrong

        return _replaced(Engine, "step", wrap)

    return change


def _louder(seed: int) -> Any:
    """The embeddings' gradient is multiplied by the number of ranks once too often."""
    from lvtrain.classifier.sharded import ShardedClassifier

    def wrap(enter: Any) -> Any:
        def wrong(self: Any, **phase: Any) -> None:
            enter(self, **phase)
            self.gradient_scale = float(self.ranks) ** 2

        return wrong

    return _replaced(ShardedClassifier, "enter_phase", wrap)


def _summed(seed: int) -> Any:
    """Gradients are added over the ranks instead of averaged, as DDP with a wrong divisor."""
    from lvtrain.engine.engine import Engine

    def wrap(backward: Any) -> Any:
        def wrong(self: Any, loss: torch.Tensor) -> None:
            backward(self, loss)
            if self._micro == self.accumulation:
                ranks = torch.distributed.get_world_size()
                for groups in self._engine.optimizer.averaged_gradients.values():
                    for gradient in groups or ():
                        gradient.mul_(ranks)

        return wrong

    return _replaced(Engine, "backward", wrap)


def _network(spoil: Callable[[torch.nn.Module], None]) -> Callable[[int], Any]:
    def change(seed: int) -> Any:
        from lvtrain.methods import supervised

        def wrap(create: Any) -> Any:
            def wrong(recipe: Any, device: Any) -> Any:
                backbone = create(recipe, device)
                with torch.no_grad():
                    spoil(backbone)
                return backbone

            return wrong

        return _replaced(supervised, "initial_backbone", wrap)

    return change


def _kill(backbone: torch.nn.Module) -> None:
    for name, parameter in backbone.named_parameters():
        if name.endswith("fc1.bias"):
            parameter[: int(0.7 * len(parameter))] = -30.0


def _freeze(backbone: torch.nn.Module) -> None:
    for name, parameter in backbone.named_parameters():
        if name.startswith(("blocks.", "patch_embed", "pos_embed")):
            parameter.requires_grad_(False)


def _rows(share: float) -> Callable[[int], Any]:
    """The first `share` of this rank's class centres stay as they are."""

    def change(seed: int) -> Any:
        from lvtrain.classifier.optimizer import CentreOptimizer

        def wrap(step: Any) -> Any:
            def wrong(self: Any, *arguments: Any, **keywords: Any) -> None:
                held = self.weight[: int(share * len(self.weight))].detach().clone()
                step(self, *arguments, **keywords)
                with torch.no_grad():
                    self.weight[: len(held)] = held

            return wrong

        return _replaced(CentreOptimizer, "step", wrap)

    return change


def _same_part(seed: int) -> Any:
    """Every rank reads the part of rank 0."""
    from lvtrain.data.loader import Loader

    def wrap(positions: Any) -> Any:
        def wrong(self: Any, number: int) -> np.ndarray:
            own, self.rank = self.rank, 0
            try:
                return positions(self, number)
            finally:
                self.rank = own

        return wrong

    return _replaced(Loader, "positions", wrap)


def _quarter(seed: int) -> Any:
    """Rank 1 sees the first quarter of the dataset only."""
    from lvtrain.data.loader import Loader

    def wrap(job: Any) -> Any:
        def wrong(self: Any, positions: np.ndarray, ids: np.ndarray) -> Any:
            return job(self, positions, ids % (len(self.dataset) // 4) if self.rank == 1 else ids)

        return wrong

    return _replaced(Loader, "_job", wrap)


def to_bgr(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3], channels in the other order."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


_TWO = ("phases.0.micro_batches=2", "phases.0.end={at_most: 20 steps}")

FAULTS: dict[str, Fault] = {
    "scale too small": Fault(("first loss",), change=_margin(scale=32.0)),
    "scale too large": Fault(("first loss",), change=_margin(scale=128.0)),
    "scale wrong in the recipe": Fault(("scale",), ("classifier.margin.scale=4",)),
    "margin too small": Fault(("first loss",), change=_margin(m=0.1)),
    "margin too large": Fault(("first loss",), change=_margin(m=0.8)),
    "labels shuffled": Fault(("labels",), change=_labels(_shuffled)),
    "labels shifted by a shard": Fault(("labels",), change=_labels(_shifted)),
    "classes split": Fault(("split",), change=_labels(_split, lambda count: count + (count + 1) // 2)),
    "classes merged": Fault(("merged",), change=_labels(_merged, lambda count: count // 3 * 2 + min(count % 3, 2))),
    "no normalisation, 0 to 255": Fault(("normalisation",), change=_images(lambda x, seed: x * 127.5 + 127.5)),
    "no normalisation, 0 to 1": Fault(("normalisation",), change=_images(lambda x, seed: x / 2 + 0.5)),
    "BGR from the loader": Fault(("bgr",), change=_images(lambda x, seed: x.flip(1))),
    "BGR in the files": Fault(("bgr",), data="bgr"),
    "learning rate x 30": Fault(("rate high",), ("optimizer.lr=0.03",)),
    "learning rate x 30 in the engine": Fault(("rate high",), change=_step(lr=30.0)),
    "learning rate / 100": Fault(("rate low",), ("optimizer.lr=1e-5",)),
    "learning rate / 100 in the engine": Fault(("rate low",), change=_step(lr=0.01)),
    "no warm-up": Fault(("warm-up",), ("schedule.warmup=0 steps",)),
    "weight decay x 100": Fault(("decay",), ("optimizer.weight_decay=10",)),
    "weight decay x 100 in the engine": Fault(("decay",), change=_step(weight_decay=100.0)),
    "gradient x ranks": Fault(("gradient",), _TWO, _louder, ranks=2),
    "gradient added, not averaged": Fault(("gradient",), _TWO, _summed, ranks=2),
    "frozen backbone": Fault(("frozen",), change=_step(lr=0.0)),
    "frozen blocks": Fault(("frozen",), change=_network(_freeze)),
    "dead units": Fault(("dead",), change=_network(_kill)),
    "sampling too small": Fault(("sampling",), ("phases.0.sample_rate=0.02",)),
    "half of the images grey": Fault(("constant",), change=_images(lambda x, s: _half(x, torch.zeros(1)))),
    "half of the images without colour": Fault(
        ("colourless",), change=_images(lambda x, s: _half(x, x.mean(dim=1, keepdim=True).expand_as(x)))
    ),
    "half of the images identical": Fault(("copies",), change=_images(_one_image)),
    "a rank reads another's part": Fault(("part",), _TWO, _same_part, ranks=2),
    "a rank reads a quarter": Fault(("part",), _TWO, _quarter, ranks=2),
    "augmentation crops a crumb": Fault(("augmentation",), change=_images(_crumb)),
    "augmentation blurs all": Fault(("augmentation",), change=_images(_blurred)),
    "augmentation erases all": Fault(("augmentation",), change=_images(_erased)),
    "class centres not updated": Fault(("rows",), change=_rows(1.0)),
    "half of the class centres not updated": Fault(("rows",), change=_rows(0.5)),
    "EMA evaluated too early": Fault(("ema",), ("ema={decay: 0.9999}",)),
    "images in two identities": Fault(("duplicates",), change=_duplicates),
    "too many classes": Fault(("classes",), change=_labels(lambda i, old, n, s: old(i), lambda count: 2 * count)),
}
