"""`init_from`: weights of another run, a checkpoint, a safetensors file or an ONNX pack as the start of a new run; never its schedule or its moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lvtrain.backbones import Backbone
from lvtrain.checkpoint.reader import Weights
from lvtrain.classifier import ShardedClassifier
from lvtrain.data import ShardDataset
from lvtrain.distributed.world import World
from lvtrain.engine.precision import at_precision
from lvtrain.errors import UserError
from lvtrain.evaluation.extract import embed
from lvtrain.methods import Method
from lvtrain.recipe.sections import InitFrom, Recipe
from lvtrain.training.folded_norms import restore_norms
from lvtrain.weights.architecture import recognise
from lvtrain.weights.runs import read_initial, shapes_of

IMAGES = 16  # of a class, at most: the mean of more moves little
_TOGETHER = 65_536  # embeddings a rank holds at once


def start_weights(method: Method, recipe: Recipe, dataset: ShardDataset, world: World) -> dict[str, Any]:
    """Everything a fresh run starts from besides its seed; the fields of an event, empty when there is nothing. Every rank calls it."""
    told: dict[str, Any] = {}
    if recipe.init_from is not None:
        told = load_initial(recipe.init_from, method)
        restored = restore_norms(method.evaluated(), dataset, world=world, image_size=recipe.backbone.image_size)
        if restored:
            told["norms"] = f"{restored} folded BatchNorms have the statistics of this dataset"
        if recipe.init_from.classifier == "means":
            told["classifier"] = _centres_from_means(method, recipe, dataset, world)
    told |= method.load_start_weights()
    if told:
        method.after_initial_weights()
    return told


def check_start_weights(recipe: Recipe, method: Method) -> None:
    """Refuses what `start_weights` would, by names and shapes alone; `method` may be on the meta device.

    Raises:
        UserError: weights that fit nowhere, or class rows of another number or width.
    """
    if (section := recipe.init_from) is not None:
        shapes, rows = shapes_of(section.path)
        weights = _adopted({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, method)
        _fitting(section.path, weights, method)
        if section.classifier == "load":
            _check_centres(section.path, rows, method)
        if section.classifier == "means":
            _classifier(method, "means")
    method.check_start_weights()


def load_initial(section: InitFrom, method: Method) -> dict[str, Any]:
    """Puts the weights in place and says what was taken, as fields of an event. Reads on every rank, without communication.

    Raises:
        UserError: the weights fit nowhere, or class rows are asked for whose number or width differs.
    """
    source, weights = read_initial(section.path)
    weights = _adopted(weights, method)
    taken, missing = _fitting(section.path, weights, method)
    method.evaluated().load_state_dict({name: weights[name] for name in taken}, strict=False)
    told: dict[str, Any] = {"path": str(section.path), "tensors": len(taken), "left_fresh": missing[:8]}
    if section.classifier == "load":
        told["classifier"] = _load_centres(section.path, source, method)
    return told


def _adopted(weights: dict[str, torch.Tensor], method: Method) -> dict[str, torch.Tensor]:
    """By the names that the backbone has for them."""
    module = method.evaluated()
    return module.adopt(weights) if isinstance(module, Backbone) else weights


def _fitting(path: Path, weights: dict[str, torch.Tensor], method: Method) -> tuple[list[str], list[str]]:
    """Which of the source's tensors have a place in the evaluated module, and which of its parameters get none."""
    module = method.evaluated()
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    own = module.state_dict()
    for name in own:
        if name in shapes and shapes[name] != own[name].shape:
            raise UserError(
                f"init_from.path: {path} has {name} as {tuple(shapes[name])}, this backbone as {tuple(own[name].shape)}; "
                "use the same backbone section"
            )
    taken = [name for name in own if name in shapes]
    parameters = {name for name, _ in module.named_parameters()}
    missing = sorted(parameters.difference(taken))
    if len(missing) == len(parameters):
        raise UserError(f"init_from.path: {path} has no weight of {type(module).__name__}; {_whose(shapes)}")
    return taken, missing


def _whose(shapes: dict[str, torch.Size]) -> str:
    """What to do about weights of another network: its backbone section, where it is one of ours."""
    try:
        found = recognise({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    except UserError:
        return "give its backbone section to this run, or import foreign weights with tools/convert_checkpoint.py"
    return f"set backbone to {{name: {found.name}, embedding_dim: {found.embedding_dim}, overrides: {found.overrides}}}"


def _centres_from_means(method: Method, recipe: Recipe, dataset: ShardDataset, world: World) -> str:
    images = start_from_means(_classifier(method, "means"), method.evaluated(), dataset, recipe, world)
    return f"rows from the means of {images} images"


def _classifier(method: Method, choice: str) -> ShardedClassifier:
    classifier: ShardedClassifier | None = getattr(method, "classifier", None)
    if classifier is None:
        raise UserError(f"init_from.classifier={choice}: this method has no class rows; use classifier=fresh")
    return classifier


def _check_centres(path: Path, rows: torch.Size | None, method: Method) -> ShardedClassifier:
    classifier = _classifier(method, "load")
    if rows is None:
        raise UserError(f"init_from.classifier=load: {path} holds a backbone only; use classifier=fresh")
    if tuple(rows) != (classifier.num_classes, classifier.embedding_dim):
        raise UserError(
            f"init_from.classifier=load: {path} has class rows {tuple(rows)}, this run needs {(classifier.num_classes, classifier.embedding_dim)}; "
            "classifier=means starts them from its embeddings, classifier=fresh anew"
        )
    return classifier


def _load_centres(path: Path, source: Weights | None, method: Method) -> str:
    has = source is not None and "classifier.weight" in source.reader.names
    classifier = _check_centres(path, source.reader.shape("classifier.weight") if source and has else None, method)
    assert source is not None
    with torch.no_grad():
        classifier.weight.copy_(source.reader.rows("classifier.weight", *classifier.rows))
    return f"{classifier.num_classes} rows loaded"


class _Encoded:
    """Some samples of a dataset as `evaluation.extract.Images`."""

    def __init__(self, dataset: ShardDataset, ids: np.ndarray) -> None:
        self.dataset, self.ids = dataset, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int, /) -> bytes:
        return self.dataset.read(int(self.ids[position]))[0]


def first_of_each(labels: np.ndarray, most: int) -> np.ndarray:
    """Positions of the first `most` samples of every label, int64, ascending. `labels` int64 [N]."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    before = np.searchsorted(ordered, ordered, side="left")
    return np.sort(order[np.arange(len(order)) - before < most])


@torch.no_grad()
def start_from_means(
    classifier: ShardedClassifier,
    backbone: nn.Module,
    dataset: ShardDataset,
    recipe: Recipe,
    world: World,
    batch: int = 128,
) -> int:
    """Turns this rank's class rows into the directions of their classes' mean unit embeddings, at the length they have; the number of images that
    were embedded. A class without an image keeps its row. Every rank calls it; the same rows on any number of ranks.

    Raises:
        UserError: an image that cannot be read or decoded.
    """
    labels = dataset.labels(np.arange(len(dataset)))
    chosen = first_of_each(labels, IMAGES)
    start, stop = classifier.rows
    sums = torch.zeros(
        stop - start, classifier.embedding_dim
    )  # on the host, where the order of additions is always the same

    forward = at_precision(backbone, recipe.optimizer.precision, world.device)
    was_training = backbone.training
    backbone.eval()
    for first in range(0, len(chosen), _TOGETHER):
        ids = chosen[first : first + _TOGETHER]
        rows = embed(
            forward,
            _Encoded(dataset, ids),
            world=world,
            batch=batch,
            device=world.device,
            image_size=recipe.backbone.image_size,
            mirror=False,
        )
        here = (labels[ids] >= start) & (labels[ids] < stop)
        sums.index_add_(
            0, torch.from_numpy(labels[ids][here] - start), nn.functional.normalize(torch.from_numpy(rows[here]))
        )
    backbone.train(was_training)
    means = sums.to(classifier.weight.device, classifier.weight.dtype)
    length = torch.linalg.vector_norm(classifier.weight, dim=1, keepdim=True)
    known = torch.linalg.vector_norm(means, dim=1, keepdim=True) > 0
    classifier.weight.copy_(torch.where(known, nn.functional.normalize(means) * length, classifier.weight))
    return len(chosen)
