"""The interface of a method: which modules it trains, its loss, what a phase changes, its state and its cost.

One step, as the trainer runs it:

    method.begin_step(now, global_labels)            # now: which step, its learning rate, how far the run is
    for batch in micro_batches:                      # those of this rank
        outputs = engine(*method.inputs(batch))      # method.module under DeepSpeed
        engine.backward(method.loss(outputs, batch, now).loss)
    engine.step(...)                                 # the backbone
    method.end_step(now, engine.full_parameters)     # class centres, banks, teachers
    (or method.discard_step(), if the loss was not finite)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from lvtrain import randomness
from lvtrain.backbones import Backbone, create_backbone
from lvtrain.checkpoint.state import State
from lvtrain.data.augment import SETS, View, augmentation
from lvtrain.errors import UserError
from lvtrain.health.first_loss import FirstLoss
from lvtrain.methods.cost import Cost
from lvtrain.recipe.base import Duration, NamedSection
from lvtrain.recipe.registry import METHODS
from lvtrain.recipe.sections import Phase, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from lvtrain.data import Batch


@dataclass(frozen=True)
class StepInfo:
    """Where the run is.

    Attributes:
        step: counts from 0.
        lr: the backbone's learning rate in this step.
        progress: share of the schedule that is behind, in [0, 1).
        epoch: images seen over the dataset's size.
    """

    step: int
    lr: float
    progress: float
    epoch: float

    def warmup_factor(self, warmup: Duration) -> float:
        """Share of a warm-up in steps or epochs that is behind: 0 in the first step, 1 from its end on."""
        behind = self.step if warmup.unit == "steps" else self.epoch
        return min(1.0, behind / warmup.amount) if warmup.amount else 1.0


@dataclass
class LossOutput:
    """The loss of one micro-batch of R ranks with m images each.

    Attributes:
        loss: scalar, the mean over all R * m images; or over this rank's, and `Method.global_loss` then says so.
        metrics: detached scalars on the device, for `metrics.jsonl`.
        cosine: detached `[R * m]`, of each image to its own class centre, in the order of ranks and the same on every
            rank; None where there are no classes.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    cosine: torch.Tensor | None = None


class MethodSection(NamedSection):
    """A method's part of a recipe. A subclass adds the method's options, each with a default and a description."""

    def sources(self) -> dict[str, Path]:
        """Weights that the options name, by their key below `method`."""
        return {}

    def stated_licences(self) -> dict[str, str | None]:
        """The licences that the recipe states for weights of `sources`, by the same keys."""
        return {}


class Method(ABC):
    """One paper. It is built anew for every phase; `module` is what the engine trains, everything else is the method's.

    A subclass is registered under the name that recipes use: `@METHODS.register("pco")`.

    Attributes:
        section: the model of its part of a recipe.
        phase: the model of a phase, where the method adds keys to it.
        title: what logs, the report and the model card call it.
        views: those of `data.augmentation` that it trains on.
        cos2_window: steps over which the mean of cos^2 is taken that `phases.*.end.cos2` is compared with; 0 where there
            are no class centres.
    """

    section: ClassVar[type[MethodSection]] = MethodSection
    phase: ClassVar[type[Phase]] = Phase
    title: ClassVar[str]
    views: ClassVar[tuple[str, ...]] = ("image",)

    module: nn.Module
    cos2_window: int = 0

    @abstractmethod
    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device) -> None: ...

    @classmethod
    def cost(cls, recipe: Recipe, phase: Phase) -> Cost:
        """What a step of the phase needs besides the backbone, for the planner."""
        return Cost()

    @classmethod
    def first_loss(cls, recipe: Recipe, *, num_classes: int) -> FirstLoss | str:
        """What the loss of the run's first step must be, or why that is not known."""
        return "the method does not say what its first loss is"

    @classmethod
    def frozen_networks(cls, recipe: Recipe) -> dict[str, Callable[[], Backbone]]:
        """Networks beside the trained one that only run forward, whole on every rank, by name: each builds one.

        One whose weights are not on this machine is left out.
        """
        return {}

    def served_views(self, views: tuple[View, ...]) -> tuple[View, ...]:
        """The views that the loader makes, from those of `data.augmentation`; a method may add some."""
        return views

    def still_parts(self) -> list[nn.Module]:
        """Parts of `module` that stay in evaluation mode while it is trained."""
        return []

    @abstractmethod
    def evaluated(self) -> nn.Module:
        """The part of `module` that maps images `[B, 3, H, W]` to embeddings `[B, d]`. It is evaluated, averaged, exported."""

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """The arguments of `module` for one micro-batch."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch, now: StepInfo) -> LossOutput:
        """The loss of one micro-batch. Every rank calls it, so it may run collectives."""

    @abstractmethod
    def enter_phase(self, phase: Phase, *, first_time: bool) -> None:
        """Sets what the phase changes.

        `first_time` is False where the phase continues from a checkpoint. Nothing is initialised then.
        """

    def check_files(self) -> None:
        """Refuses what `open_files` would; `module` may be on the meta device.

        Raises:
            UserError: a file that the method's section names is missing, or does not fit.
        """

    def open_files(self) -> dict[str, dict[str, str]]:
        """Reads what every start needs besides a checkpoint, such as a teacher; called once, before the first step.

        Returns facts for `events.jsonl`, by what was read; one of them is its `name`.
        """
        return {}

    def check_start_weights(self) -> None:
        """Refuses what `load_start_weights` would, by names and shapes alone; `module` may be on the meta device.

        Raises:
            UserError: a file that a fresh run needs is missing, or does not fit.
        """

    def load_start_weights(self) -> dict[str, str]:
        """Loads what a fresh run starts from besides `init_from`. Returns what was loaded, for the log."""
        return {}

    def after_initial_weights(self) -> None:
        """Called once, after `init_from` and `load_start_weights` have put weights into `module`."""

    def warnings(self, metrics: dict[str, Any], now: StepInfo) -> list[str]:
        """What goes wrong, such as a collapse, for the log. `metrics` are the figures of a log line."""
        return []

    def begin_step(self, now: StepInfo, global_labels: torch.Tensor) -> None:
        """Called before the first micro-batch. `global_labels`: int64 `[G]` on the host, of the whole global batch."""

    def global_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss over all ranks, from this rank's `loss`; itself, where that is already over all ranks' images."""
        return loss

    def end_step(self, now: StepInfo, full_parameters: Callable[[], AbstractContextManager[None]]) -> None:
        """Updates what is not in the engine. Inside `full_parameters()` every weight of `module` is whole on every rank."""

    def discard_step(self) -> None:
        """Forgets the step that was begun, because its loss was not finite."""

    def state(self) -> State:
        """Everything outside the engine that a resumed run needs, by dotted name."""
        return {}

    def load_state(self, reader: Any) -> None:
        """Restores what `state` gave: `reader.rows(name, start, stop)` for this rank's rows, `reader.replicated(name)`."""


def method_title(name: str) -> str:
    """What to call a method in a report or a card: its name and title, or the name alone of one that is not here."""
    try:
        return f"{name} ({METHODS.get(name).title})"
    except UserError:
        return name


def create_method(recipe: Recipe, *, num_classes: int, device: torch.device) -> Method:
    """The method that a recipe names, on this rank's device, with weights from the recipe's seed.

    Raises:
        UserError: settings that do not go together.
    """
    name = recipe.method.name
    method: type[Method] = METHODS.get(name)
    _check_views(recipe, method)
    made = method(recipe, num_classes=num_classes, device=device)
    for phase in recipe.phases:
        if phase.end.cos2 is not None and not made.cos2_window:
            raise UserError(
                f"phases.{phase.name}.end.cos2: method {name} has no class centres to take a cosine to; "
                "use end.at_most or end.until"
            )
    return made


def _check_views(recipe: Recipe, method: type[Method]) -> None:
    name, needed = recipe.data.augmentation, set(method.views)
    if not needed <= {view.name for view in augmentation(name)}:
        fit = [other for other, views in SETS.items() if needed <= {view.name for view in views}]
        raise UserError(
            f"data.augmentation={name} does not make the views that method {recipe.method.name} trains on; "
            f"use one of {', '.join(fit)}"
        )


def initial_backbone(recipe: Recipe, device: torch.device) -> nn.Module:
    """The recipe's backbone with weights drawn from the seed alone."""
    section = recipe.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.torch_seed(recipe.seed, "backbone-weights"))
        arguments: dict[str, Any] = dict(section.overrides)
        if section.checkpoint_blocks != "none":
            arguments["checkpoint_blocks"] = section.checkpoint_blocks
        backbone = create_backbone(
            section.name, embedding_dim=section.embedding_dim, image_size=section.image_size, **arguments
        )
    return backbone.to(device)
