"""Distillation of a large network into a small one, beside the classification of any supervised method.

    L = (1 - w) L_method + w mean_i (1 - cos(s_i, t_i))      s, t: embeddings of student and teacher of the same image

The mean is over the micro-batches of all ranks, as that of the classification. An image that could not be decoded (label
-1) counts in the divisor and adds nothing.

The teacher is frozen, and whole on every rank. A checkpoint holds only its fingerprint, so that a resumed run refuses
another teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from lvtrain.checkpoint.state import Replicated, State
from lvtrain.data import Batch
from lvtrain.errors import UserError
from lvtrain.methods.base import LossOutput
from lvtrain.recipe.base import REQUIRED, Section, setting

_FINGERPRINT = "distill.teacher"


class Distill(Section):
    """A frozen teacher that the embeddings follow."""

    teacher: Path = setting(
        REQUIRED,
        "teacher: a run, a checkpoint, an exported folder or weights of another project, with the student's embedding_dim and image_size",
        resume="free",  # the path may change: a checkpoint records a fingerprint of the teacher's weights and compares it
    )
    input: str = setting(
        "",
        'how a teacher of another project takes images, if its file does not say so: "bgr", "bgr 0..255"',
        resume="free",
    )
    weight: float = setting(
        0.99,
        "weight of the distance to the teacher; near 1, because the gradient of the classification is 64 times as large (its scale)",
        gt=0,
        lt=1,
    )
    view: Literal["same", "clean"] = setting(
        "same",
        "what the teacher sees: the student's augmented image, or the image with only its crop and flip",
        because="a change would make it another run",
    )
    licence: str | None = setting(
        None,
        "licence of the data that the teacher learned from, if its file does not state it; the student inherits it",
        because="the weights inherit this licence",
    )


@dataclass(frozen=True)
class Teacher:
    """A frozen network.

    Attributes:
        backbone: `[B, 3, S, S]` -> `[B, d]` of the student's S and d, in evaluation mode and without gradients.
        fingerprint: SHA-256 of its weights.
        name: for logs.
    """

    backbone: nn.Module
    fingerprint: bytes
    name: str


class Distillation:
    """The teacher's part of a supervised method's loss, on this rank."""

    def __init__(self, section: Distill, teacher: Teacher, device: torch.device, *, bfloat16: bool) -> None:
        self.weight, self.path, self.teacher = section.weight, section.teacher, teacher
        self.sees_clean = section.view == "clean"
        self.backbone = teacher.backbone.to(device)
        self.bfloat16 = bfloat16

    def mixed(self, own: LossOutput, embeddings: torch.Tensor, batch: Batch) -> LossOutput:
        """The method's own loss of a micro-batch, mixed with the teacher's part.

        Args:
            own: the method's loss and metrics.
            embeddings: the student's, float `[B, d]`, not normalised.
            batch: the same micro-batch.
        """
        term = self.distance(embeddings, batch)
        return LossOutput(
            (1 - self.weight) * own.loss + self.weight * term, own.metrics | {"loss_distillation": term.detach()}
        )

    def distance(self, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Scalar: the mean of 1 - cos over this rank's micro-batch. Its gradient goes to `embeddings`."""
        images = batch.views["clean"] if self.sees_clean else batch.images
        valid = batch.labels >= 0
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            target = self.backbone(images)
        # an image that could not be decoded may give NaN: masked before the cosine, so that its gradient is 0 and not NaN
        own, target = (torch.where(valid.unsqueeze(1), each.float(), 0.0) for each in (embeddings, target))
        cosine = (F.normalize(own) * F.normalize(target)).sum(dim=1)
        return torch.where(valid, 1 - cosine, 0.0).mean()

    def state(self) -> State:
        return {_FINGERPRINT: Replicated(torch.tensor(list(self.teacher.fingerprint), dtype=torch.uint8))}

    def check_state(self, reader: Any) -> None:
        """Raises UserError where the checkpoint was distilled from another teacher."""
        if bytes(reader.replicated(_FINGERPRINT).tolist()) != self.teacher.fingerprint:
            raise UserError(
                f"method.distill.teacher: {self.path} has other weights than the teacher this run began with; "
                "give that teacher, or start a new run (name=..., init_from)"
            )
