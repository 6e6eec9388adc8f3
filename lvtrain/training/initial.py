"""The weights that a new run starts from: `init_from`, and what a method reads itself.

`init_from` takes the same weights as evaluation (`weights/source.py`), but no schedule or optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lvtrain.backbones import Backbone
from lvtrain.classifier import ShardedClassifier
from lvtrain.data import ShardDataset
from lvtrain.data.subset import first_of_each
from lvtrain.distributed.world import World
from lvtrain.engine.precision import at_precision
from lvtrain.errors import UserError
from lvtrain.evaluation.sources import ShardImages
from lvtrain.methods import Method
from lvtrain.recipe.sections import InitFrom, Recipe
from lvtrain.weights.architecture import recognise
from lvtrain.weights.extract import Setting, decode
from lvtrain.weights.norms import folded_norms, restore_statistics
from lvtrain.weights.source import Source, open_source

IMAGES = 16  # per class, at most: more images change the mean little
_TOGETHER = 65_536  # embeddings that a rank holds at once
_NORM_IMAGES = 512  # a deviation from so many embeddings is known to 3%
_NORM_BATCH = 64


def start_weights(method: Method, recipe: Recipe, dataset: ShardDataset, world: World) -> dict[str, Any]:
    """Loads everything that a new run starts from besides its seed. A collective.

    Returns:
        What was loaded, as fields of an event; empty if nothing was.
    """
    loaded: dict[str, Any] = {}
    if recipe.init_from is not None:
        loaded = load_initial(recipe.init_from, method)
        restored = restore_norms(method.evaluated(), dataset, world=world, image_size=recipe.backbone.image_size)
        if restored:
            loaded["norms"] = f"{restored} folded BatchNorms have the statistics of this dataset"
        if recipe.init_from.classifier == "means":
            images = start_from_means(_classifier(method, "means"), method.evaluated(), dataset, recipe, world)
            loaded["classifier"] = f"means of {images} images"
    loaded |= method.load_start_weights()
    if loaded:
        method.after_initial_weights()
    return loaded


def check_start_weights(recipe: Recipe, method: Method) -> None:
    """Refuses what `start_weights` would refuse, by names and shapes alone.

    Args:
        recipe: the recipe; its `init_from` names the weights.
        method: may be on the meta device.

    Raises:
        UserError: weights that do not fit, or class centres of another number or width.
    """
    if (section := recipe.init_from) is not None:
        source = open_initial(section)
        weights = {name: torch.empty(shape, device="meta") for name, shape in source.shapes.items()}
        _fitting(section.path, _adopted(weights, method), method)
        if section.classifier == "load":
            _check_centres(source, method)
        if section.classifier == "means":
            _classifier(method, "means")
        if section.head_only is not None and getattr(method, "classifier", None) is None:
            raise UserError(
                f"init_from.head_only={section.head_only}: this method has no class centres to train alone; leave it out"
            )
    method.check_start_weights()


def open_initial(section: InitFrom) -> Source:
    """What `init_from` names; any weights that evaluation and teachers take.

    Raises:
        UserError: nothing usable at its path.
    """
    try:
        return open_source(section.path, takes=section.input)
    except UserError as error:
        raise UserError(f"init_from.path: {error}") from error


def load_initial(section: InitFrom, method: Method) -> dict[str, Any]:
    """Loads `init_from`'s backbone, and class centres where the recipe asks for them. Every rank reads for itself.

    Returns:
        What was loaded, as fields of an event.

    Raises:
        UserError: the weights do not fit, or the class centres have another number or width.
    """
    source = open_initial(section)
    weights = _adopted(source.state(), method)
    taken, missing = _fitting(section.path, weights, method)
    method.evaluated().load_state_dict({name: weights[name] for name in taken}, strict=False)
    loaded: dict[str, Any] = {"path": str(section.path), "tensors": len(taken), "left_fresh": missing[:8]}
    if source.input_line:
        loaded["input"] = source.input_line
    if section.classifier == "load":
        loaded["classifier"] = _load_centres(source, method)
    return loaded


def _adopted(weights: dict[str, torch.Tensor], method: Method) -> dict[str, torch.Tensor]:
    """The weights by the backbone's names."""
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
    """Advice for weights of another network: its backbone section, if it is one of ours."""
    try:
        found = recognise({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    except UserError:
        return "give its backbone section to this run, or import foreign weights with tools/convert_checkpoint.py"
    return f"set backbone to {{name: {found.name}, embedding_dim: {found.embedding_dim}, overrides: {found.overrides}}}"


def _classifier(method: Method, choice: str) -> ShardedClassifier:
    classifier: ShardedClassifier | None = getattr(method, "classifier", None)
    if classifier is None:
        raise UserError(f"init_from.classifier={choice}: this method has no class centres; use classifier=fresh")
    return classifier


def _check_centres(source: Source, method: Method) -> ShardedClassifier:
    classifier = _classifier(method, "load")
    needed = (classifier.num_classes, classifier.embedding_dim)
    if source.centres_shape is None:
        raise UserError(f"init_from.classifier=load: {source.path} has no class centres; use classifier=means or fresh")
    if tuple(source.centres_shape) != needed:
        raise UserError(
            f"init_from.classifier=load: {source.path} has class centres {tuple(source.centres_shape)}, this run needs {needed}; "
            "use classifier=means or fresh"
        )
    return classifier


def _load_centres(source: Source, method: Method) -> str:
    classifier = _check_centres(source, method)
    with torch.no_grad():
        classifier.weight.copy_(source.class_centres(*classifier.rows))
    return f"{classifier.num_classes} class centres loaded"


def restore_norms(backbone: nn.Module, dataset: ShardDataset, *, world: World, image_size: int) -> int:
    """Gives BatchNorms that an ONNX export folded away the statistics of some training images; returns their number.

    Every rank goes through the same images; the first rank's figures count. A collective.
    """
    norms = folded_norms(backbone)
    if not norms:
        return 0
    restore_statistics(backbone, _some_images(dataset, image_size, world.device))
    if world.size > 1:
        for norm in norms.values():
            for tensor in norm.state_dict().values():
                dist.broadcast(tensor, 0)
    return len(norms)


def _some_images(dataset: ShardDataset, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Images from the whole dataset, evenly spread. One that cannot be decoded is left out."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, _NORM_IMAGES).astype(np.int64))
    for start in range(0, len(chosen), _NORM_BATCH):
        images = []
        for sample in chosen[start : start + _NORM_BATCH]:
            try:
                images.append(decode(dataset.read(int(sample))[0], size))
            except UserError:
                continue
        if images:
            pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
            yield pixels.float().sub_(127.5).div_(127.5)


@torch.no_grad()
def start_from_means(
    classifier: ShardedClassifier,
    backbone: nn.Module,
    dataset: ShardDataset,
    recipe: Recipe,
    world: World,
    batch: int = 128,
) -> int:
    """Points this rank's class centres in the directions of their classes' mean unit embeddings.

    Their lengths stay. A class without an image keeps its centre. The result does not depend on the number of ranks.
    A collective.

    Args:
        classifier: whose centres are set.
        backbone: `[B, 3, S, S]` -> `[B, d]`, pretrained.
        dataset: images and labels.
        recipe: for the precision and the image size.
        world: this process among the ranks.
        batch: images in a forward.

    Returns:
        The number of images that were embedded.

    Raises:
        UserError: an image that cannot be read or decoded.
    """
    labels = dataset.labels(np.arange(len(dataset)))
    chosen = first_of_each(labels, IMAGES)
    start, stop = classifier.rows
    # on the host, where the order of additions is always the same
    sums = torch.zeros(stop - start, classifier.embedding_dim)
    forward = at_precision(backbone, recipe.optimizer.precision, world.device)
    setting = Setting(world, world.device, batch, recipe.backbone.image_size)
    was_training = backbone.training
    backbone.eval()
    for first in range(0, len(chosen), _TOGETHER):
        ids = chosen[first : first + _TOGETHER]
        rows = setting.embed(forward, ShardImages(dataset, ids), mirror=False)
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
