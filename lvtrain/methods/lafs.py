"""LAFS: landmark-based self-supervised pretraining (CVPR 2024, arXiv 2403.08161): DINO over landmarks instead of crops.

A frozen landmark CNN, from a supervised Part fViT, places R = 196 patches. The teacher sees all of them, the student
`landmarks` (36) of them; the loss is DINO's (equation 5). Two augmentations act on landmarks (section 3.3):

- perturbation: r <- r + alpha u, u ~ N(0, 1), alpha = 2 pixels (equation 6);
- shuffling their order.

The landmark CNN looks at a twin of each view, which had the same flip and crop, but no colour augmentation (supplement
8.1.3).

Our readings:

- Every view of the student is a subset, those of the global crops too (section 3.2, supplement 8.1.3). The released code
  gives the student those two whole.
- The 36 landmarks are distinct. The released code draws with replacement, and gives them the first 36 positions.
- Shuffling gives landmark pi(k) to position k; position embeddings stay in place. Without it a landmark keeps its own
  position, in a subset too.
- The teacher's landmarks are augmented like the student's (algorithm 1, line 7).

Every draw is a function of (seed, step, sample, view), so it does not depend on the number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lvtrain import randomness
from lvtrain.backbones.part_fvit import PartFViT
from lvtrain.data import Batch
from lvtrain.distributed.world import to_device
from lvtrain.errors import UserError
from lvtrain.methods.base import StepInfo
from lvtrain.methods.dino import DinoMethod, DinoSection, view_names
from lvtrain.recipe.base import setting
from lvtrain.recipe.registry import METHODS
from lvtrain.recipe.sections import Recipe
from lvtrain.weights.source import open_source

# images [B, 3, H, W], landmarks [B, N, 2] in pixels, positions [B, N]
View = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class LafsSection(DinoSection):
    """The teacher sees all landmarks, the student a subset."""

    landmarks: int = setting(36, "number of landmarks that the student sees", gt=0)
    shuffle: bool = setting(True, "the student sees its landmarks in random order")
    perturbation: float = setting(2.0, "alpha: how far landmarks are moved at random", unit="pixels", ge=0)
    landmark_weights: Path | None = setting(
        None, "run or weights of a supervised Part fViT; its landmark CNN is used, frozen"
    )

    def sources(self) -> dict[str, Path]:
        return {"landmark_weights": self.landmark_weights} if self.landmark_weights else {}


@METHODS.register("lafs")
class LafsMethod(DinoMethod):
    """LAFS: landmark-based self-supervised pretraining (Sun et al., CVPR 2024)."""

    section = LafsSection
    title = "LAFS: landmark-based self-supervised pretraining (CVPR 2024)"
    settings: LafsSection
    views = ("global_0", "global_1", "global_0_landmarks", "global_1_landmarks")
    _now: StepInfo
    _teacher_views: tuple[View, ...]

    @classmethod
    def view_shares(cls, recipe: Recipe) -> dict[str, float]:
        """A subset of the landmarks costs its share of the patches. The landmark CNN's passes are left out (1%)."""
        settings: LafsSection = recipe.method  # type: ignore[assignment]
        patches = (recipe.backbone.image_size // recipe.backbone.overrides.get("patch", 8)) ** 2
        return dict.fromkeys(super().view_shares(recipe), min(1.0, settings.landmarks / patches))

    def prepare(self) -> None:
        backbone = self.evaluated()
        if not isinstance(backbone, PartFViT):
            raise UserError(
                "method lafs needs a backbone with landmarks; set backbone.name to part_fvit_tiny or part_fvit_base"
            )
        if self.settings.landmarks > backbone.num_tokens:
            raise UserError(
                f"method.landmarks={self.settings.landmarks} but the backbone has {backbone.num_tokens} landmarks"
            )
        if self.settings.landmark_weights is None and self.recipe.init_from is None:
            raise UserError(
                "method lafs would keep an untrained landmark CNN fixed; set method.landmark_weights to a supervised Part fViT run"
            )
        if not backbone.freeze_landmarks:
            raise UserError("method lafs keeps the landmark CNN fixed; set backbone.overrides.freeze_landmarks: true")

    def check_start_weights(self) -> None:
        if (path := self.settings.landmark_weights) is not None:
            if not path.exists():
                raise UserError(
                    f"method.landmark_weights: {path} does not exist; train a supervised Part fViT first, and give its run"
                )
            self._landmark_names(open_source(path).shapes)

    def load_start_weights(self) -> dict[str, str]:
        """The landmark CNN of a supervised Part fViT."""
        if (path := self.settings.landmark_weights) is None:
            return {}
        source = open_source(path)
        weights, names = source.state(), self._landmark_names(source.shapes)
        self.evaluated().load_state_dict({name: weights[name] for name in names}, strict=False)
        return {"landmark_cnn": str(path)}

    def _landmark_names(self, shapes: dict[str, torch.Size]) -> list[str]:
        """The landmark CNN's tensors, which must all be among `shapes`, those of the file."""
        backbone = self.evaluated()
        assert isinstance(backbone, PartFViT)
        own = backbone.landmark_state()
        for name, tensor in own.items():
            if shapes.get(name) != tensor.shape:
                raise UserError(
                    f"method.landmark_weights: {self.settings.landmark_weights} has no {name} of shape {tuple(tensor.shape)}; "
                    "give a supervised run of the same Part fViT"
                )
        return list(own)

    def begin_step(self, now: StepInfo, global_labels: torch.Tensor) -> None:
        super().begin_step(now, global_labels)
        self._now = now

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """The student's views: a subset of the landmarks of each."""
        names = view_names(batch)
        points = {name: self._landmarks(batch.views[f"{name}_landmarks"]) for name in names}
        globals_ = [name for name in names if name.startswith("global")]
        self._teacher_views = tuple(self._view(batch, name, points[name], None, "teacher") for name in globals_)
        return tuple(self._view(batch, name, points[name], self.settings.landmarks, "student") for name in names)

    def _view(self, batch: Batch, name: str, points: torch.Tensor, count: int | None, branch: str) -> View:
        """One view of one branch: `count` of its landmarks (all, if None), augmented."""
        return landmark_view(
            batch.views[name],
            points,
            count=points.shape[1] if count is None else count,
            shuffle=self.settings.shuffle,
            perturbation=self.settings.perturbation,
            seed=self.recipe.seed,
            purpose=f"lafs/{branch}/{name}",
            step=self._now.step,
            sample_ids=to_device(batch.sample_ids, self.device),
        )

    def teacher_inputs(self, batch: Batch, now: StepInfo) -> tuple[Any, ...]:
        return self._teacher_views

    @torch.no_grad()
    def _landmarks(self, images: torch.Tensor) -> torch.Tensor:
        # the teacher's copy of the frozen landmark CNN: whole on every rank under every ZeRO stage
        teacher = self.teacher.get_submodule("backbone")
        assert isinstance(teacher, PartFViT)
        return teacher.predict_landmarks(images)


def landmark_view(
    images: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    count: int,
    shuffle: bool,
    perturbation: float,
    seed: int,
    purpose: str,
    step: int,
    sample_ids: torch.Tensor,
) -> View:
    """Some landmarks of each image, perturbed, and the position of each.

    Args:
        images: `[B, 3, H, W]`, returned as they are.
        landmarks: `[B, N, 2]`, (x, y) in pixels.
        count: landmarks to draw, at most N.
        shuffle: whether their order changes.
        perturbation: alpha, pixels.
        seed: the draw is a function of this, the purpose, the step and the sample id.
        purpose: name of the draw.
        step: number of the optimizer step.
        sample_ids: int64 `[B]`.

    Returns:
        Images, landmarks `[B, count, 2]` and positions int64 `[B, count]`. With `count = N`, no shuffle and no
        perturbation, the landmarks themselves.
    """
    number = landmarks.shape[1]
    slot = torch.arange(number, device=landmarks.device)[None]
    ids = sample_ids[:, None].expand(-1, number)

    def uniform(what: str, counter: torch.Tensor = slot) -> torch.Tensor:
        return randomness.torch_uniform(seed, f"{purpose}/{what}", step, ids, counter)

    positions = slot.expand(len(landmarks), -1)
    if count < number:
        positions = uniform("subset").argsort(dim=1)[:, :count].sort(dim=1).values
    source = positions
    if shuffle:
        source = uniform("shuffle").argsort(dim=1).gather(1, positions)
    chosen = landmarks.gather(1, source[..., None].expand(-1, -1, 2))
    if perturbation:
        radius = torch.sqrt(-2 * torch.log1p(-uniform("radius")))
        angle = 2 * torch.pi * uniform("angle")
        noise = torch.stack(
            [radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1
        )  # Box-Muller: both are N(0, 1)
        chosen = chosen + perturbation * noise.gather(1, source[..., None].expand(-1, -1, 2)).to(chosen.dtype)
    return images, chosen, positions
