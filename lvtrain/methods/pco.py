"""PCO: progressive cluster optimisation (LVFace, ICCV 2025, arXiv 2501.13420).

Three phases over one backbone and one sharded classifier:

1. feature alignment: negative class sub-sampling (NCS: r·C classes in all, r = 0.1) and CosFace;
2. centroid stabilisation: NCS, and a second anchor per class, its feature expectation e, which follows the features
   without a gradient (`classifier.banks.ExpectationBank`);
3. boundary refinement: both anchors, all classes, e frozen.

    L = mean_i log(1 + e^(N_i - T_i) + e^(Ne_i - Te_i))

N is the log-sum-exp over the negatives and T the target logit; Ne and Te are those of the expectations.

Each is a phase of the recipe: `sample_rate` is r, `expectation` is off, update or frozen, `end.cos2` is CSS's delta.

Our reading: the second anchor's margin is CosFace's with `m2`, whatever margin the class centres have (the paper does not
say for ArcFace). With `expectation_init: weight` e begins at the class centres.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from pydantic import field_validator

from lvtrain.checkpoint.state import Rows, State
from lvtrain.classifier import Anchor, ClassifierOutput
from lvtrain.classifier.banks import ExpectationBank
from lvtrain.classifier.margins import CosFace, MarginSection
from lvtrain.methods.base import StepInfo
from lvtrain.methods.cost import Cost
from lvtrain.methods.supervised import SupervisedMethod, SupervisedSection
from lvtrain.recipe.base import setting
from lvtrain.recipe.registry import METHODS
from lvtrain.recipe.sections import LOSS, Phase, Recipe


class PcoSection(SupervisedSection):
    """The phases are the recipe's; these are the options of the second anchor."""

    expectation_init: Literal["weight", "first_feature"] = setting(
        "weight", "where feature expectations start: at the class centres, or at each class's first feature"
    )
    expectation_negatives: Literal["own", "shared"] = setting(
        "own",
        "own: feature expectations have their own sum over the negatives; shared: they use that of the class centres, which is faster",
    )
    m2: float = setting(0.4, "margin of the feature expectations", ge=0, le=1)


class PcoPhase(Phase):
    """A phase of PCO: also whether the feature expectations, the second anchor, take part."""

    expectation: Literal["off", "update", "frozen"] = setting(
        "off", "feature expectations: not used, used and updated in every step, or used without updates", because=LOSS
    )

    @field_validator("expectation", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false


@METHODS.register("pco")
class PcoMethod(SupervisedMethod):
    """`expectations`: the bank of the current phase, None where the phase has none."""

    section = PcoSection
    phase = PcoPhase
    title = "PCO: progressive cluster optimisation (LVFace, ICCV 2025)"
    settings: PcoSection

    @classmethod
    def cost(cls, recipe: Recipe, phase: Phase) -> Cost:
        assert isinstance(phase, PcoPhase)
        if phase.expectation == "off":
            return super().cost(recipe, phase)
        settings: PcoSection = recipe.method  # type: ignore[assignment]
        own = settings.expectation_negatives == "own"
        return Cost(has_classes=True, banks=("feature expectations",), bank_has_negatives=own)

    @classmethod
    def first_anchors(cls, recipe: Recipe) -> tuple[MarginSection, ...]:
        """The feature expectations, where the first phase has them and they begin at the class centres."""
        phase, settings, classifier = recipe.phases[0], recipe.method, recipe.classifier
        assert isinstance(phase, PcoPhase) and isinstance(settings, PcoSection) and classifier is not None
        if phase.expectation == "off" or settings.expectation_init != "weight":
            return ()  # without a direction they take no part
        return (CosFace(scale=classifier.margin.scale, m=settings.m2).settings,)

    def __init__(self, recipe: Recipe, *, num_classes: int, device: torch.device) -> None:
        super().__init__(recipe, num_classes=num_classes, device=device)
        self.expectation_margin = CosFace(scale=self.classifier.margin.scale, m=self.settings.m2)
        self.expectations: ExpectationBank | None = None
        self.updates = False  # of the expectations in this phase
        self.seen: list[ClassifierOutput] = []  # of the current step, for the update
        self.expected: torch.Tensor | None = None  # labels of the current step, on the host

    def enter_phase(self, phase: Phase, *, first_time: bool) -> None:
        assert isinstance(phase, PcoPhase)
        super().enter_phase(phase, first_time=first_time)
        self.updates = phase.expectation == "update"
        if phase.expectation == "off":
            self.expectations = None
        elif self.expectations is None:
            self.expectations = self._new_bank(start=first_time)

    def _new_bank(self, *, start: bool) -> ExpectationBank:
        """`start`: give it its first values, which a state that is loaded does not need."""
        head = self.classifier
        bank = ExpectationBank(head.num_classes, head.embedding_dim, head.rows, device=head.weight.device)
        if start and self.settings.expectation_init == "weight":
            head.settle()
            bank.start_from(head.weight.detach())
        return bank

    # -------------------------------------------------------------------------------------------------------------------- step

    def begin_step(self, now: StepInfo, global_labels: torch.Tensor) -> None:
        super().begin_step(now, global_labels)
        self.expected = global_labels
        self.seen.clear()

    def classify(self, embeddings: torch.Tensor, labels: torch.Tensor, now: StepInfo) -> ClassifierOutput:
        output = self.classifier(embeddings, labels, step=now.step, anchors=self.anchors())
        if self.updates:
            self.seen.append(output)
        return output

    def anchors(self) -> list[Anchor]:
        """The feature expectations, where the phase has them."""
        bank, settings = self.expectations, self.settings
        if bank is None:
            return []
        return [
            Anchor(
                bank.rows_tensor.to(self.classifier.weight.dtype),
                self.expectation_margin,
                valid=bank.valid if settings.expectation_init == "first_feature" else None,
                is_unit=True,
                own_negatives=settings.expectation_negatives == "own",
            )
        ]

    def end_step(self, now: StepInfo, full_parameters: Callable[[], AbstractContextManager[None]]) -> None:
        super().end_step(now, full_parameters)
        if self.expectations is not None and self.updates:
            labels = torch.cat([output.labels for output in self.seen])
            embeddings = torch.cat([output.embeddings for output in self.seen])
            self.expectations.update(embeddings, labels, self.expected)
        self.seen.clear()

    def discard_step(self) -> None:
        super().discard_step()
        self.seen.clear()

    # ------------------------------------------------------------------------------------------------------------------- state

    def state(self) -> State:
        if self.expectations is None:
            return super().state()
        start, total = self.expectations.rows[0], self.expectations.num_classes
        bank: State = {
            f"classifier.{name}": Rows(tensor, start, total) for name, tensor in self.expectations.state().items()
        }
        return super().state() | bank

    def load_state(self, reader: Any) -> None:
        super().load_state(reader)
        if (bank := self.expectations) is not None:
            bank.load_state({name: reader.rows(f"classifier.{name}", *bank.rows) for name in bank.state()})
