"""A recipe's phases as plans, for `--dry-run` and `tools/plan.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from lvtrain.backbones import Backbone, create_backbone
from lvtrain.classifier.kernel import planned_kernel
from lvtrain.errors import UserError
from lvtrain.methods import METHODS
from lvtrain.methods.cost import Cost
from lvtrain.planning.device import H200, Device
from lvtrain.planning.network import Network, forward_peak, measure_network
from lvtrain.planning.plan import Plan, plan
from lvtrain.planning.setup import ClassCentres, FrozenNetwork, Setup, Zero
from lvtrain.recipe.sections import Phase, Recipe


def plan_phases(
    recipe: Recipe,
    *,
    ranks: int,
    zero: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    device: Device = H200,
) -> dict[str, Plan]:
    """The plan of each phase, by its name.

    Args:
        recipe: resolved.
        ranks: GPUs.
        zero: DeepSpeed's `zero_optimization` section; stage 1 if absent.
        num_classes: the recipe's `data.num_classes` if absent.
        device: the GPU and its links.

    Raises:
        UserError: a phase's micro-batches cannot be split over so many ranks, or the number of classes is unknown.
    """
    network, frozen = measure(recipe)
    settings = Zero.of(zero or {})
    plans = {}
    for phase in recipe.phases:
        if phase.micro_batches % ranks:
            raise UserError(
                f"phase {phase.name!r}: {phase.micro_batches} micro-batches cannot be split over {ranks} ranks; "
                f"use one of {', '.join(map(str, divisors(phase.micro_batches)))}"
            )
        setup = phase_setup(recipe, phase, network, frozen, num_classes=num_classes)
        accumulation = phase.micro_batches // ranks
        plans[phase.name] = plan(replace(setup, ranks=ranks, accumulation=accumulation, zero=settings, device=device))
    return plans


def measure(recipe: Recipe) -> tuple[Network, tuple[FrozenNetwork, ...]]:
    """The recipe's backbone, and the networks that its method keeps beside it."""
    size = recipe.backbone.image_size
    method = METHODS.get(recipe.method.name)

    def frozen(name: str, build: Callable[[], Backbone]) -> FrozenNetwork:
        return FrozenNetwork(name, measure_network(name, build, image_size=size), forward_peak(build, image_size=size))

    network = measure_network(recipe.backbone.name, lambda: _build(recipe), image_size=size)
    return network, tuple(frozen(name, build) for name, build in method.frozen_networks(recipe).items())


def phase_setup(
    recipe: Recipe,
    phase: Phase,
    network: Network,
    frozen: Iterable[FrozenNetwork] = (),
    *,
    num_classes: int | None = None,
) -> Setup:
    """What a phase needs on one rank; `network` and `frozen` are from `measure`."""
    cost: Cost = METHODS.get(recipe.method.name).cost(recipe, phase)
    return Setup(
        replace(network, parameters=network.parameters + cost.parameters, largest=max(network.largest, cost.largest)),
        ranks=1,
        micro_batch=phase.micro_batch,
        classes=_class_centres(recipe, phase, cost, num_classes) if cost.has_classes else None,
        cost=cost,
        frozen=tuple(frozen),
        precision=recipe.optimizer.precision,
        compiled=recipe.backbone.compile,
        ema=recipe.ema is not None,
    )


def _build(recipe: Recipe) -> Backbone:
    backbone = recipe.backbone
    return create_backbone(
        backbone.name,
        embedding_dim=backbone.embedding_dim,
        image_size=backbone.image_size,
        checkpoint_blocks=backbone.checkpoint_blocks,
        **backbone.overrides,
    )


def _class_centres(recipe: Recipe, phase: Phase, cost: Cost, num_classes: int | None) -> ClassCentres | None:
    classes, classifier = num_classes or recipe.data.num_classes, recipe.classifier
    if classifier is None:
        return None
    if classes is None:
        raise UserError(
            "data.num_classes is not in the recipe; give it (data.num_classes=...) to plan without the data"
        )
    return ClassCentres(
        classes,
        recipe.backbone.embedding_dim,
        sample_rate=phase.sample_rate,
        banks=cost.banks,
        bank_has_negatives=cost.bank_has_negatives,
        optimizer=classifier.optimizer.name,
        mode=classifier.optimizer.mode,
        moments_bytes=2 if classifier.optimizer.moments == "bfloat16" else 4,
        precision=classifier.numerics.precision,
        kernel=planned_kernel(classifier.numerics.kernel),
        scale=classifier.margin.scale,
        filtered=classifier.margin.filter_threshold is not None,
        gather_bytes=2 if classifier.numerics.gather == "bfloat16" else 4,
        keep_mb=classifier.numerics.keep_mb,
    )


def divisors(number: int) -> list[int]:
    """Sorted."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
