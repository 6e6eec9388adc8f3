"""DINO: self-distillation without labels (Caron et al., ICCV 2021), as LAFS (CVPR 2024) uses it on faces.

A student sees all views of an image, a teacher the two global ones. The student's distribution over K prototypes follows
the teacher's, for every pair of different views:

    L = mean over pairs (t, s), t != s, and over the batch, of  - softmax((T_t - c) / tau_t) . log softmax(S_s / tau_s)

- The teacher is the exponential moving average of the student, and gets no gradient. Every rank keeps it whole in float32
  and updates it at the end of a step, from the student's whole weights. So its forward pass needs no communication.
- The centre c is the moving average of the teacher's mean output. It is summed over all micro-batches of the step in their
  order, so it does not depend on the number of ranks.
- The loss keeps the student's logits, their log-softmax and the teacher's targets: about 3.4 x views x batch x K x 4
  bytes, 0.9 GB for 64 images, 10 views and K = 100,000. `--dry-run` lists it as "prototype logits". If it does not fit,
  use more micro-batches.
- In the first `freeze_last_layer` epochs the prototypes get no gradient, as in DINO's code.

Our readings:

- While the prototypes are frozen, their optimizer moments stay zero (in DINO's code they begin afterwards), and weight
  decay continues, which has no effect on a prototype of unit length.
- The gradient is clipped by its norm over all weights (DINO: each weight's own).
- Position embeddings and the class token get no weight decay.
- The teacher's temperature rises with every step (DINO: with every epoch).

Three figures show a collapse, and the log warns of it:

- `teacher_entropy`: of the sharpened teacher for an image, in nats. Near log K, the teacher is uniform.
- `prototype_entropy`: of the teacher's mean over a micro-batch. Near 0, all images are on one prototype.
- `feature_std`: of the student's unit embeddings over a micro-batch. Near 0, all embeddings are equal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from lvtrain import randomness
from lvtrain.checkpoint.state import Replicated, State
from lvtrain.data import Batch
from lvtrain.data.augment import augmentation
from lvtrain.distributed import world as worlds
from lvtrain.distributed.collectives import all_gather_rows, group_size
from lvtrain.errors import UserError
from lvtrain.health.first_loss import FirstLoss
from lvtrain.methods.base import LossOutput, Method, MethodSection, StepInfo, initial_backbone
from lvtrain.methods.cost import Cost
from lvtrain.methods.student import ProjectionHead, Student
from lvtrain.recipe.base import setting
from lvtrain.recipe.registry import METHODS
from lvtrain.recipe.sections import Phase, Recipe

# copies of the student's prototype logits that the loss holds at its peak, measured (float32 and bfloat16, 10 views)
LOGIT_COPIES = 3.4


def view_names(batch: Batch) -> list[str]:
    """The student's views, global ones first. What only the landmark CNN sees (LAFS) is left out."""
    return sorted(name for name in batch.views if not name.endswith("_landmarks"))  # "global" sorts before "local"


def dino_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    centre: torch.Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Scalar: the mean over the pairs of different views, and over the images.

    Args:
        student: float32 logits `[views, B, K]`, the teacher's views first.
        teacher: float32 logits `[teacher views, B, K]`, without gradient.
        centre: float32 `[K]`.
        student_temperature: tau_s.
        teacher_temperature: tau_t.
        weights: `[B]`, 0 for an image that could not be decoded; the divisor stays B.
    """
    target = functional.softmax((teacher - centre) / teacher_temperature, dim=-1)
    loss = student.new_zeros(())
    pairs = 0
    for s, view in enumerate(student):
        log_probability = functional.log_softmax(view / student_temperature, dim=-1)
        for t in range(len(target)):
            if t != s:
                loss = loss - ((target[t] * log_probability).sum(-1) * weights).mean()
                pairs += 1
    return loss / pairs


_HEAD = "the head in the checkpoints has this shape"


class DinoSection(MethodSection):
    """The defaults are DINO's; the size of the head is LAFS's."""

    prototypes: int = setting(100_000, "K: number of prototypes of the head", because=_HEAD, gt=1, lt=2**32)
    hidden: int = setting(2048, "width of the head's hidden layers", because=_HEAD, gt=0, le=1_048_576)
    bottleneck: int = setting(
        256, "width of the head's last layer before the prototypes", because=_HEAD, gt=0, le=65_536
    )
    student_temperature: float = setting(0.1, "tau_s of the student's softmax", gt=0)
    teacher_temperature: float = setting(0.04, "tau_t of the teacher's softmax, after the warm-up", gt=0)
    teacher_temperature_start: float = setting(0.04, "tau_t at the start of the warm-up", gt=0)
    teacher_warmup_epochs: float = setting(
        0, "warm-up of tau_t: time in which it goes from its start value to its final value", unit="epochs", ge=0
    )
    teacher_momentum: float = setting(
        0.996, "momentum of the teacher at the start; it goes to 1 by a cosine", gt=0, le=1
    )
    centre_momentum: float = setting(0.9, "decay of the centre of the teacher's outputs", ge=0, lt=1)
    freeze_last_layer: float = setting(
        1, "time at the start in which the prototypes are not trained", unit="epochs", ge=0
    )


@METHODS.register("dino")
class DinoMethod(Method):
    """DINO: self-distillation without labels (Caron et al., ICCV 2021)."""

    section: ClassVar[type[MethodSection]] = DinoSection
    title = "DINO: self-distillation without labels (ICCV 2021)"
    settings: DinoSection
    views: ClassVar[tuple[str, ...]] = ("global_0", "global_1")

    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device) -> None:
        section: DinoSection = recipe.method  # type: ignore[assignment]
        self.settings, self.recipe, self.device = section, recipe, device
        backbone = initial_backbone(recipe, device)
        sizes = {view.size for view in augmentation(recipe.data.augmentation)} - {None, recipe.backbone.image_size}
        if sizes and not getattr(backbone, "takes_any_size", False):
            raise UserError(
                f"backbone {recipe.backbone.name} takes images of {recipe.backbone.image_size} pixels only, and "
                f"data.augmentation={recipe.data.augmentation} has views of {sizes.pop()}; "
                "use a fvit, part_fvit or dino_vit, or data.augmentation: lafs"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(randomness.torch_seed(recipe.seed, "projection-head"))
            head = ProjectionHead(
                recipe.backbone.embedding_dim, section.prototypes, hidden=section.hidden, bottleneck=section.bottleneck
            ).to(device)
        self.module = Student(backbone, head)
        self.prepare()
        self.teacher = copy.deepcopy(self.module).eval().requires_grad_(False)
        self.centre = torch.zeros(section.prototypes, device=device)
        self._sums: list[torch.Tensor] = []

    @classmethod
    def first_loss(cls, recipe: Recipe, *, num_classes: int) -> FirstLoss | str:
        """Cross-entropy of two networks with the same random weights: log K + 1 / (2 b tau_s^2) - rho / (b tau_s tau_t).

        b is the head's bottleneck, where two views of an image have the cosine rho, which is not known: from 0 to 1. It
        holds for K well above exp(1 / (b tau_t^2)), which is 12 in the paper's head: no few prototypes then carry a sum.
        """
        if recipe.init_from is not None:
            return "the network does not start at random"
        settings: DinoSection = recipe.method  # type: ignore[assignment]
        width, student = settings.bottleneck, settings.student_temperature
        teacher = settings.teacher_temperature_start
        if settings.prototypes < 50 * math.exp(min(1 / (width * min(student, teacher) ** 2), 50.0)):
            return f"{settings.prototypes:,} prototypes are too few to predict the first loss"
        most = 1 / (width * student * teacher)
        expected = math.log(settings.prototypes) + 1 / (2 * width * student**2) - most / 2
        bound = most / 2 + 0.005 * math.log(settings.prototypes)
        return FirstLoss(expected, bound, f"log K of {settings.prototypes:,} prototypes, and their temperatures")

    @classmethod
    def cost(cls, recipe: Recipe, phase: Phase) -> Cost:
        """The student with its head sees all views, the teacher the global ones; both keep prototype logits of them."""
        settings: DinoSection = recipe.method  # type: ignore[assignment]
        shares, seen = cls.view_shares(recipe), augmentation(recipe.data.augmentation)
        size = recipe.backbone.image_size
        hidden, bottleneck = settings.hidden, settings.bottleneck
        widths = [recipe.backbone.embedding_dim, hidden, hidden, bottleneck, settings.prototypes]
        return Cost(
            views=sum(shares.values()),
            forward_views=float(sum(name.startswith("global") for name in shares)),
            loaded=sum(((view.size or size) / size) ** 2 for view in seen),
            parameters=sum(a * b for a, b in pairwise(widths)),
            largest=bottleneck * settings.prototypes,
            copies=("teacher",),
            per_image={"prototype logits": LOGIT_COPIES * 4.0 * len(shares) * settings.prototypes},
        )

    @classmethod
    def view_shares(cls, recipe: Recipe) -> dict[str, float]:
        """What a view of the student's costs, by name, in images of full size."""
        size = recipe.backbone.image_size
        views = augmentation(recipe.data.augmentation)
        return {view.name: ((view.size or size) / size) ** 2 for view in views if view.twin is None}

    def prepare(self) -> None:
        """Checks or changes the student, before the teacher is copied from it."""

    def after_initial_weights(self) -> None:
        """The teacher starts as the student."""
        self.teacher.load_state_dict(self.module.state_dict())

    def evaluated(self) -> nn.Module:
        return self.module.get_submodule("backbone")

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return tuple(batch.views[name] for name in view_names(batch))

    def enter_phase(self, phase: Phase, *, first_time: bool) -> None:
        """DINO has one phase; nothing changes with it."""

    def begin_step(self, now: StepInfo, global_labels: torch.Tensor) -> None:
        self._sums = []
        head = self.module.get_submodule("head")
        assert isinstance(head, ProjectionHead)
        head.frozen = now.epoch < self.settings.freeze_last_layer

    def loss(self, outputs: Any, batch: Batch, now: StepInfo) -> LossOutput:
        student, embeddings = outputs
        half = self.recipe.optimizer.precision == "bfloat16"
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=half),
        ):  # as the engine runs the student
            teacher, _ = self.teacher(*self.teacher_inputs(batch, now))
        weights = (batch.labels >= 0).to(student.dtype)
        self._sums.append((teacher * weights[:, None]).mean(dim=(0, 1)))
        temperature = self.teacher_temperature(now)
        loss = dino_loss(
            student,
            teacher,
            self.centre,
            student_temperature=self.settings.student_temperature,
            teacher_temperature=temperature,
            weights=weights,
        )
        with torch.no_grad():
            probability = functional.softmax((teacher[0] - self.centre) / temperature, dim=-1)
            mean = probability.mean(0)
            watched = {
                "teacher_entropy": -torch.xlogy(probability, probability).sum(-1).mean(),
                "prototype_entropy": -torch.xlogy(mean, mean).sum(),
                "feature_std": functional.normalize(embeddings, dim=-1).std(dim=0).mean(),
            }
        return LossOutput(loss, watched)

    def teacher_inputs(self, batch: Batch, now: StepInfo) -> tuple[Any, ...]:
        """The global views."""
        return tuple(batch.views[name] for name in view_names(batch) if name.startswith("global"))

    def global_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return worlds.mean_over_ranks(loss)

    def end_step(self, now: StepInfo, full_parameters: Callable[[], AbstractContextManager[None]]) -> None:
        self._move_centre()
        momentum = self.teacher_momentum(now)
        with torch.no_grad(), full_parameters():
            for theirs, ours in zip(self.teacher.parameters(), self.module.parameters()):
                theirs.lerp_(ours.to(theirs.dtype), 1.0 - momentum)
            buffers = dict(self.module.named_buffers())  # a compiled network has more of them
            for name, buffer in self.teacher.named_buffers():
                buffer.copy_(buffers[name])

    def _move_centre(self) -> None:
        sums = torch.stack(self._sums)
        sums = all_gather_rows(sums, [len(sums)] * group_size())
        total = torch.zeros_like(self.centre)
        for row in sums:  # one by one, in the order of the micro-batches: the same bits on any number of ranks
            total += row
        self.centre.lerp_(total / len(sums), 1.0 - self.settings.centre_momentum)
        self._sums = []

    def discard_step(self) -> None:
        self._sums = []

    def teacher_momentum(self, now: StepInfo) -> float:
        """Cosine from its first value to 1 over the schedule."""
        first = self.settings.teacher_momentum
        return 1.0 - (1.0 - first) * (math.cos(math.pi * now.progress) + 1.0) / 2.0

    def teacher_temperature(self, now: StepInfo) -> float:
        """Linear warm-up over the first epochs."""
        settings = self.settings
        share = min(1.0, now.epoch / settings.teacher_warmup_epochs) if settings.teacher_warmup_epochs else 1.0
        return settings.teacher_temperature_start + share * (
            settings.teacher_temperature - settings.teacher_temperature_start
        )

    def warnings(self, metrics: dict[str, Any], now: StepInfo) -> list[str]:
        """A collapse, where the figures show one."""
        found = []
        most = math.log(self.settings.prototypes)
        if metrics["feature_std"] < 1e-3:
            found.append("collapse: the embeddings of different images are nearly equal (feature_std < 1e-3)")
        if metrics["prototype_entropy"] < 1e-2:
            found.append("collapse: the teacher puts all images on one prototype (prototype_entropy < 0.01)")
        elif metrics["teacher_entropy"] > 0.999 * most:
            found.append(
                f"collapse: the teacher is uniform over its prototypes (teacher_entropy > 0.999 log K = {0.999 * most:.2f})"
            )
        return found

    def state(self) -> State:
        saved: State = {f"teacher.{name}": Replicated(tensor) for name, tensor in self.teacher.state_dict().items()}
        return saved | {"dino.centre": Replicated(self.centre)}

    def load_state(self, reader: Any) -> None:
        self.teacher.load_state_dict({name: reader.replicated(f"teacher.{name}") for name in self.teacher.state_dict()})
        self.centre.copy_(reader.replicated("dino.centre"))
