"""What every supervised method shares: a backbone under the engine and a sharded classifier outside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lvtrain.data import Batch
from lvtrain.methods.base import LossOutput, Method, Now, initial_backbone
from lvtrain.methods.heads import create_classifier, rows_rates
from lvtrain.recipe import Phase, Recipe
from lvtrain.state import State


class SupervisedMethod(Method):
    """One phase or several of classification with the recipe's margin; `classifier_options` win over the recipe's classifier section."""

    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device, **classifier_options: Any) -> None:
        self.recipe = recipe
        self.backbone: nn.Module = initial_backbone(recipe, device)
        self.module = self.backbone
        self.classifier = create_classifier(recipe, num_classes=num_classes, device=device, **classifier_options)

    def evaluated(self) -> nn.Module:
        return self.backbone

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return (batch.images,)

    def enter_phase(self, phase: Phase, *, first_time: bool) -> None:
        self.classifier.enter_phase(sample_rate=phase.sample_rate, expectation=phase.expectation, first_time=first_time)

    def begin_step(self, now: Now, global_labels: torch.Tensor) -> None:
        self.classifier.begin_step(now.step, global_labels, **rows_rates(self.recipe, now))

    def loss(self, outputs: Any, batch: Batch, now: Now) -> LossOutput:
        output = self.classifier(outputs, batch.labels, step=now.step)
        return LossOutput(output.loss, {"cos2": output.cos2})

    def end_step(self, now: Now, full_parameters: Callable[[], AbstractContextManager[None]]) -> None:
        self.classifier.end_step(**rows_rates(self.recipe, now))

    def discard_step(self) -> None:
        self.classifier.discard_step()

    def state(self) -> State:
        return {f"classifier.{name}": saved for name, saved in self.classifier.state().items()}

    def load_state(self, reader: Any) -> None:
        self.classifier.load_state(reader, prefix="classifier.")
