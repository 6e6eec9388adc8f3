"""Fine-tuning of a pretrained backbone with CosFace, as LAFS does it (CVPR 2024, section 3.5 and supplement 8.2).

The weights come from the recipe's `init_from`. For the landmark CNN of a Part fViT there are the paper's options:

- (a) `fixed`: not trained;
- (b) `trained`: with the rest;
- (c) `anchored`: trained, with + beta * mean ||r_hat - r||_2, which keeps its points r_hat near those of a frozen copy, r.

Our reading of equation 7: the mean, over images and landmarks, of the distance in pixels; and the frozen copy is the
landmark CNN that fine-tuning starts from. The released code has the mean squared distance in shares of the image, with a
weight that falls over the epochs.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from lvtrain.backbones.part_fvit import PartFViT
from lvtrain.checkpoint.state import Replicated, State
from lvtrain.data import Batch
from lvtrain.distributed import world as worlds
from lvtrain.errors import UserError
from lvtrain.methods.base import LossOutput, StepInfo
from lvtrain.methods.supervised import SupervisedMethod, SupervisedSection
from lvtrain.recipe.base import setting
from lvtrain.recipe.registry import METHODS
from lvtrain.recipe.sections import Recipe


class WithLandmarks(nn.Module):
    """`[B, 3, H, W]` -> embeddings `[B, d]` and landmarks `[B, N, 2]`, which the anchored option needs both."""

    def __init__(self, backbone: PartFViT) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, landmarks = self.backbone(images, return_landmarks=True)
        return embeddings, landmarks


class FinetuneSection(SupervisedSection):
    """What happens to the landmark CNN of a Part fViT."""

    landmarks: Literal["fixed", "trained", "anchored"] = setting(
        "trained", "the landmark CNN: the paper's options a, b, c"
    )
    beta: float = setting(
        0.1, "with anchored: weight of the distance to a frozen landmark CNN's points, in pixels", ge=0
    )


@METHODS.register("finetune")
class FinetuneMethod(SupervisedMethod):
    """Fine-tuning from pretrained weights (LAFS, CVPR 2024)."""

    section = FinetuneSection
    title = "fine-tuning from pretrained weights (LAFS, CVPR 2024)"
    settings: FinetuneSection

    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device) -> None:
        super().__init__(recipe, num_classes=num_classes, device=device)
        self.anchor: PartFViT | None = None
        frozen = isinstance(self.backbone, PartFViT) and self.backbone.freeze_landmarks
        if frozen and self.settings.landmarks != "fixed":
            raise UserError(
                f"method.landmarks={self.settings.landmarks} trains the landmark CNN; set backbone.overrides.freeze_landmarks: false, "
                "or method.landmarks: fixed"
            )
        if self.settings.landmarks == "trained":
            return
        if not isinstance(self.backbone, PartFViT):
            raise UserError(
                f"method.landmarks={self.settings.landmarks} needs a Part fViT; {recipe.backbone.name} has no landmark CNN"
            )
        if self.settings.landmarks == "fixed" and not frozen:
            raise UserError("method.landmarks=fixed: set backbone.overrides.freeze_landmarks: true")
        if recipe.init_from is None:
            raise UserError(
                f"method.landmarks={self.settings.landmarks} needs a trained landmark CNN; set init_from, or method.landmarks: trained"
            )
        if self.settings.landmarks == "anchored":
            self.module = WithLandmarks(self.backbone)
            self.anchor = copy.deepcopy(self.backbone).eval().requires_grad_(False)
            self.anchor.transformer = nn.Identity()  # only its landmark CNN is used

    def after_initial_weights(self) -> None:
        """The anchor is the landmark CNN fine-tuning starts from."""
        if self.anchor is not None:
            assert isinstance(self.backbone, PartFViT)
            self.anchor.load_state_dict(self.backbone.landmark_state(), strict=False)

    def own_loss(self, outputs: Any, batch: Batch, now: StepInfo) -> LossOutput:
        if self.anchor is None:
            return super().own_loss(outputs, batch, now)
        embeddings, landmarks = outputs
        output = super().own_loss(embeddings, batch, now)
        with torch.no_grad():
            held = self.anchor.predict_landmarks(batch.images)
        valid = (batch.labels >= 0).to(landmarks.dtype)
        distance = (torch.linalg.vector_norm(landmarks - held, dim=-1).mean(dim=1) * valid).mean()
        output.metrics["landmark_distance"] = distance.detach()
        return LossOutput(output.loss + self.settings.beta * distance, output.metrics, output.cosine)

    def global_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The distance is that of this rank's images."""
        return super().global_loss(loss) if self.anchor is None else worlds.mean_over_ranks(loss)

    def state(self) -> State:
        if self.anchor is None:
            return super().state()
        frozen = self.anchor.landmark_state()
        return super().state() | {f"anchor.{name}": Replicated(tensor) for name, tensor in frozen.items()}

    def load_state(self, reader: Any) -> None:
        super().load_state(reader)
        if self.anchor is not None:
            frozen = {name: reader.replicated(f"anchor.{name}") for name in self.anchor.landmark_state()}
            self.anchor.load_state_dict(frozen, strict=False)
