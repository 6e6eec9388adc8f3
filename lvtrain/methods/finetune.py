"""Fine-tuning of a pretrained backbone with CosFace, as LAFS does it (CVPR 2024, section 3.5 and supplement 8.2).

The weights come from the recipe's `init_from`. For the landmark CNN of a Part fViT there are the paper's options:

- (a) `fixed`: not trained;
- (b) `trained`: with the rest;
- (c) `anchored`: trained, with + beta * mean ||r_hat - r||_2, which keeps its points r_hat near those of a frozen copy, r.

Mixup (`mixup: {alpha: 0.2, probability: 0.1}`), as the released code has it: in a step of that probability every image is
mixed with another one of its micro-batch, all with one share from Beta(alpha, alpha), and has two targets
(`lvtrain.classifier.mixed`). Our reading: one draw for the whole global batch, where the released code draws for each rank.

Our reading of equation 7: the mean, over images and landmarks, of the distance in pixels; and the frozen copy is the
landmark CNN that fine-tuning starts from. The released code has the mean squared distance in shares of the image, with a
weight that falls over the epochs.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from scipy.special import betaincinv
from torch import nn

from lvtrain import randomness
from lvtrain.backbones.part_fvit import PartFViT
from lvtrain.checkpoint.state import Replicated, State
from lvtrain.classifier import ClassifierOutput
from lvtrain.classifier.mixed import mix
from lvtrain.data import Batch
from lvtrain.distributed import world as worlds
from lvtrain.errors import UserError
from lvtrain.health.first_loss import FirstLoss
from lvtrain.methods.base import LossOutput, StepInfo
from lvtrain.methods.supervised import SupervisedMethod, SupervisedSection
from lvtrain.recipe.base import Section, setting
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


class Mixup(Section):
    """How often images are mixed, and how much."""

    alpha: float = setting(0.2, "the share of an image in the mix is drawn from Beta(alpha, alpha)", gt=0)
    probability: float = setting(
        0.1, "share of the steps in which images are mixed; LAFS: 0.1, on MS1MV3 0.2", ge=0, le=1
    )

    def share(self, seed: int, step: int) -> float:
        """The share of the own image in a step; 1 = not mixed. A function of seed and step."""
        if randomness.uniform(seed, "mixup/step", step) >= self.probability:
            return 1.0
        return float(betaincinv(self.alpha, self.alpha, randomness.uniform(seed, "mixup/share", step)))


class FinetuneSection(SupervisedSection):
    """What happens to the landmark CNN of a Part fViT, and mixup."""

    landmarks: Literal["fixed", "trained", "anchored"] = setting(
        "trained", "how the landmark CNN is trained: fixed, trained and anchored are the paper's options a, b and c"
    )
    beta: float = setting(
        0.1, "with anchored: weight of the distance (in pixels) to the landmarks of a frozen CNN", ge=0
    )
    mixup: Mixup | None = setting(None, "mixes pairs of images, which then have two targets")


@METHODS.register("finetune")
class FinetuneMethod(SupervisedMethod):
    """Fine-tuning from pretrained weights (LAFS, CVPR 2024)."""

    section = FinetuneSection
    title = "fine-tuning from pretrained weights (LAFS, CVPR 2024)"
    settings: FinetuneSection

    @classmethod
    def first_loss(cls, recipe: Recipe, *, num_classes: int) -> FirstLoss | str:
        """The margin softmax's; it is not known for the distance of landmarks."""
        settings: FinetuneSection = recipe.method  # type: ignore[assignment]
        if settings.landmarks == "anchored":
            return "what the distance of landmarks to the frozen ones begins with is not known"
        return super().first_loss(recipe, num_classes=num_classes)

    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device) -> None:
        super().__init__(recipe, num_classes=num_classes, device=device)
        self.anchor: PartFViT | None = None
        self._share, self._images = 1.0, torch.empty(0)
        if self.settings.mixup is not None and self.settings.distill is not None:
            raise UserError(
                "method.mixup and method.distill exclude each other (the teacher does not see mixed images); remove one"
            )
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

    def begin_step(self, now: StepInfo, global_labels: torch.Tensor) -> None:
        super().begin_step(now, global_labels)
        mixup = self.settings.mixup
        self._share = 1.0 if mixup is None else mixup.share(self.recipe.seed, now.step)

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        self._images = batch.images if self._share == 1 else mix(batch.images, batch.labels, self._share)
        return (self._images,)

    def classify(self, embeddings: torch.Tensor, labels: torch.Tensor, now: StepInfo) -> ClassifierOutput:
        output: ClassifierOutput = self.classifier(embeddings, labels, step=now.step, share=self._share)
        return output

    def own_loss(self, outputs: Any, batch: Batch, now: StepInfo) -> LossOutput:
        if self.anchor is None:
            return super().own_loss(outputs, batch, now)
        embeddings, landmarks = outputs
        output = super().own_loss(embeddings, batch, now)
        with torch.no_grad():
            held = self.anchor.predict_landmarks(self._images)
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
