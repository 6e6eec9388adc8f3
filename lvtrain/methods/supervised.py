"""What methods with a classifier share: a backbone under the engine, a sharded classifier outside it, maybe a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lvtrain.backbones import Backbone
from lvtrain.checkpoint.state import State
from lvtrain.classifier import ClassifierOutput
from lvtrain.classifier.margins import Margin, MarginSection
from lvtrain.data import Batch
from lvtrain.data.augment import View, with_clean_twin
from lvtrain.distributed import world as worlds
from lvtrain.errors import UserError
from lvtrain.health.first_loss import FirstLoss, Softmax, classes_in_step
from lvtrain.methods.base import LossOutput, Method, MethodSection, StepInfo, initial_backbone
from lvtrain.methods.cost import Cost
from lvtrain.methods.distill import Distill, Distillation, Teacher
from lvtrain.methods.heads import centre_rates, classifier_section, create_classifier
from lvtrain.recipe.base import setting
from lvtrain.recipe.sections import Phase, Recipe


def batch_cosine(embeddings: torch.Tensor) -> torch.Tensor:
    """Mean cosine between different images, a scalar; near 1, all embeddings are equal.

    `embeddings`: `[B, d]` of unit length, or zeros for images that could not be decoded.
    """
    valid = embeddings.square().sum()
    return (embeddings.sum(dim=0).square().sum() - valid) / (valid * (valid - 1)).clamp_min(1)


def freeze(backbone: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Takes the gradient from the parts of a backbone whose names are given, and returns those that are modules.

    Raises:
        UserError: no such part, or nothing is left to train.
    """
    parts = {name: module for name, module in backbone.named_modules() if name}
    parameters = dict(backbone.named_parameters())
    for name in names:
        found = [parameter for own, parameter in parameters.items() if own == name or own.startswith(f"{name}.")]
        if not found:
            known = ", ".join(dict.fromkeys(own.partition(".")[0] for own in parameters))
            raise UserError(
                f"method.frozen: the backbone has no part {name} with weights; its parts are {known}, and what is below them"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if names and not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(
            "method.frozen leaves nothing of the backbone to train; name fewer parts, or use init_from.head_only"
        )
    return [parts[name] for name in names if name in parts]


class SupervisedSection(MethodSection):
    """The options of every method with a classifier."""

    distill: Distill | None = setting(None, "a frozen teacher that the embeddings follow")
    frozen: list[str] = setting(
        list,
        "parts of the backbone that are not trained: names of modules or parameters, such as blocks.0; BatchNorms in them keep "
        "their statistics",
        because="the checkpoints hold no optimizer state of them",
    )
    window: int = setting(20, "steps over which the mean cos^2 is averaged for end.cos2", unit="steps", gt=0)

    def sources(self) -> dict[str, Path]:
        return {"distill.teacher": self.distill.teacher} if self.distill else {}

    def stated_licences(self) -> dict[str, str | None]:
        """The teacher's, if the recipe states one."""
        return {"distill.teacher": self.distill.licence} if self.distill else {}


class SupervisedMethod(Method):
    """A backbone under the engine, and a sharded classifier with the recipe's margin outside it.

    A subclass gives its own loss in `own_loss`; `loss` adds the teacher's part where the recipe has a `method.distill`.
    `margin` is the method's own, instead of the recipe's.
    """

    section: ClassVar[type[MethodSection]] = SupervisedSection
    settings: SupervisedSection

    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device, margin: Margin | None = None) -> None:
        self.recipe = recipe
        self.settings = recipe.method  # type: ignore[assignment]  # the recipe has it from `section`
        self.cos2_window = self.settings.window
        self.backbone: nn.Module = initial_backbone(recipe, device)
        self.module = self.backbone
        self._still = freeze(self.backbone, self.settings.frozen)
        self.classifier = create_classifier(recipe, num_classes=num_classes, device=device, margin=margin)
        self.distillation: Distillation | None = None

    @classmethod
    def cost(cls, recipe: Recipe, phase: Phase) -> Cost:
        return Cost(has_classes=True)

    @classmethod
    def first_loss(cls, recipe: Recipe, *, num_classes: int) -> FirstLoss | str:
        """The expected loss of the margin softmax, and beside it the mean of 1 - cos to a teacher, 1 for an untrained student."""
        section = classifier_section(recipe)
        if recipe.init_from is not None and recipe.init_from.classifier != "fresh":
            return f"class centres do not start at random (init_from.classifier: {recipe.init_from.classifier})"
        if (threshold := section.margin.filter_threshold) is not None and threshold < 0.5:
            return f"negatives are filtered (classifier.margin.filter_threshold: {threshold:g})"
        distill: Distill | None = getattr(recipe.method, "distill", None)
        if distill is not None and recipe.init_from is not None:
            return "the distance of pretrained embeddings to the teacher's is not known"
        phase, dim = recipe.phases[0], recipe.backbone.embedding_dim
        classes, distinct = classes_in_step(num_classes, phase.sample_rate, phase.global_batch)
        factor = 0.0 if section.margin.warmup.amount else 1.0
        anchors = cls.first_anchors(recipe)
        plain = Softmax(section.margin, num_classes, classes, dim, distinct, factor, anchors).first_loss()
        if distill is None:
            return plain
        return plain.mixed(1 - distill.weight, 1.0, 4 / dim**0.5, f"{distill.weight:g} of the distance to the teacher")

    @classmethod
    def first_anchors(cls, recipe: Recipe) -> tuple[MarginSection, ...]:
        """Margins of the method's own anchors that begin at the class centres in the first phase."""
        return ()

    @classmethod
    def frozen_networks(cls, recipe: Recipe) -> dict[str, Callable[[], Backbone]]:
        from lvtrain.methods.teacher import open_teacher  # only where it is needed: reading weights imports much

        section: Distill | None = recipe.method.distill  # type: ignore[attr-defined]
        if section is None or not section.teacher.exists():
            return {}
        architecture, _, _ = open_teacher(section, recipe.backbone)
        return {"teacher": architecture.create}

    def check_files(self) -> None:
        self._load_teacher()

    def open_files(self) -> dict[str, dict[str, str]]:
        teacher = self._load_teacher()
        if teacher is None:
            return {}
        self.distil_from(teacher)
        return {"teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint.hex()}}

    def _load_teacher(self) -> Teacher | None:
        if self.settings.distill is None:
            return None
        from lvtrain.methods.teacher import load_teacher

        return load_teacher(self.settings.distill, self.recipe.backbone)

    def distil_from(self, teacher: Teacher) -> None:
        """Sets the teacher; called once, before the first step and before `load_state`."""
        assert self.settings.distill is not None
        half = self.recipe.optimizer.precision == "bfloat16"
        self.distillation = Distillation(self.settings.distill, teacher, self.classifier.weight.device, bfloat16=half)

    def evaluated(self) -> nn.Module:
        return self.backbone

    def still_parts(self) -> list[nn.Module]:
        return self._still

    def served_views(self, views: tuple[View, ...]) -> tuple[View, ...]:
        """With `distill.view: clean`, also the image without its degradation."""
        clean = self.settings.distill is not None and self.settings.distill.view == "clean"
        return with_clean_twin(views) if clean else views

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return (batch.images,)

    def enter_phase(self, phase: Phase, *, first_time: bool) -> None:
        self.classifier.enter_phase(sample_rate=phase.sample_rate)

    def begin_step(self, now: StepInfo, global_labels: torch.Tensor) -> None:
        factor = now.warmup_factor(classifier_section(self.recipe).margin.warmup)
        self.classifier.begin_step(now.step, global_labels, warmup_factor=factor)

    def loss(self, outputs: Any, batch: Batch, now: StepInfo) -> LossOutput:
        output = self.own_loss(outputs, batch, now)
        if self.settings.distill is None:
            return output
        assert self.distillation is not None, "distil_from comes first"
        return self.distillation.mixed(output, outputs[0] if isinstance(outputs, tuple) else outputs, batch)

    def global_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Averaged over ranks where there is a teacher, whose part is of this rank's images."""
        return loss if self.settings.distill is None else worlds.mean_over_ranks(loss)

    def own_loss(self, outputs: Any, batch: Batch, now: StepInfo) -> LossOutput:
        """The method's loss without a teacher."""
        output = self.classify(outputs, batch.labels, now)
        return LossOutput(
            output.loss, {"cos2": output.cos2, "batch_cosine": batch_cosine(output.embeddings)}, output.cosine
        )

    def classify(self, embeddings: torch.Tensor, labels: torch.Tensor, now: StepInfo) -> ClassifierOutput:
        """The classifier on embeddings [b, d] and labels [b] of a micro-batch; a method may add anchors."""
        output: ClassifierOutput = self.classifier(embeddings, labels, step=now.step)
        return output

    def end_step(self, now: StepInfo, full_parameters: Callable[[], AbstractContextManager[None]]) -> None:
        self.classifier.end_step(**centre_rates(self.recipe, now))

    def discard_step(self) -> None:
        self.classifier.discard_step()

    def state(self) -> State:
        state: State = {f"classifier.{name}": saved for name, saved in self.classifier.state().items()}
        return state if self.distillation is None else state | self.distillation.state()

    def load_state(self, reader: Any) -> None:
        self.classifier.load_state(reader, prefix="classifier.")
        if self.distillation is not None:
            self.distillation.check_state(reader)
