"""The frozen network that a recipe's `method.distill` names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from lvtrain.errors import UserError
from lvtrain.methods.distill import Distill, Teacher
from lvtrain.recipe.sections import Recipe
from lvtrain.weights.architecture import fit
from lvtrain.weights.models import finite, open_backbone


def load_teacher(recipe: Recipe, *, needed: bool = True) -> Teacher | None:
    """The teacher on the host, frozen; None where the recipe names none, or (not `needed`, when planning for another machine) it is not here.

    Raises:
        UserError: nothing usable at the path, no network of ours (ONNX), weights that are not finite, or another embedding_dim or image_size
            than the student's.
    """
    section: Distill | None = getattr(recipe.method, "distill", None)
    if section is None or not (needed or section.teacher.exists()):
        return None
    path, student = section.teacher, recipe.backbone
    try:
        architecture, state, weights = open_backbone(path)
        name = f"{architecture.name} from {path}, {weights}"
        for what in ("embedding_dim", "image_size"):
            theirs, ours = getattr(architecture, what), getattr(student, what)
            if theirs != ours:
                raise UserError(
                    f"{name}, has {what} {theirs}, the student {ours}; set backbone.{what}={theirs}, or give another teacher"
                )
        finite(state, path)
        backbone = architecture.create()
        fit(backbone, state)
    except UserError as error:
        raise UserError(f"method.distill.teacher: {error}") from error
    given = {name: tensor for name, tensor in backbone.state_dict().items() if name in state}
    return Teacher(backbone.eval().requires_grad_(False), architecture.create, fingerprint(given), name)


def fingerprint(state: Mapping[str, torch.Tensor]) -> bytes:
    """SHA-256 of names, shapes and values, counters left out: the same for a run's checkpoint and for what was exported from it."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if (tensor := state[name]).is_floating_point():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.digest()
