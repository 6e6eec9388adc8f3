"""Evaluates a finished run on identities that were not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation import allpairs, suite
from lvtrain.evaluation.scores import clustering
from lvtrain.evaluation.sources import labelled_images
from lvtrain.weights import load_model


def unseen_identities(folder: Path, dataset: Path, far: str) -> dict[str, Any]:
    """All pairs, and clusterings at the cosine of the false accept rate `far`, from one pass over the images.

    Raises:
        UserError: the identities have too few pairs for that rate.
    """
    world = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(folder, device=world.device)
    setting = suite.Setting(world, world.device, image_size=model.image_size)
    images, labels = labelled_images(dataset)
    embeddings = setting.embed(model.forward, images)
    pairs = allpairs.all_pairs(embeddings, labels, device=world.device)
    if far not in pairs["tar_at_far"]:
        resolved = ", ".join(pairs["tar_at_far"]) or "none"
        raise UserError(
            f"{pairs['negative_pairs']:,} impostor pairs do not resolve a FAR of {far}; set study.far to one of: {resolved}"
        )
    cosine = pairs["tar_at_far"][far]["threshold"]
    return {"all_pairs": pairs, "clustering": clustering.run(embeddings, labels, cosine=cosine)}
