"""A recipe's phases as plans: what `--dry-run` and `tools/plan.py` print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn

from lvtrain.backbones import create_backbone
from lvtrain.data.augment import augmentation
from lvtrain.errors import UserError
from lvtrain.planning.device import H200, Device
from lvtrain.planning.memory import DEEPSPEED_BUCKET, ClassRows, Teacher
from lvtrain.planning.network import Network, forward_peak, measure_network
from lvtrain.planning.plan import Plan, plan
from lvtrain.recipe.sections import Phase, Recipe

# copies of the student's prototype logits that the loss holds at its peak, measured (float32 and bfloat16, 10 views)
_LOGIT_COPIES = 3.4


def plan_phases(
    recipe: Recipe,
    *,
    ranks: int,
    zero: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    device: Device = H200,
    teacher: Callable[[], nn.Module] | None = None,
) -> dict[str, Plan]:
    """The plan of each phase by its name, on `ranks` ranks.

    zero: DeepSpeed's `zero_optimization` section; absent: stage 1. num_classes: absent, the recipe's
    `data.num_classes`. teacher: builds the network that `method.distill` names. Raises UserError where a phase's
    micro-batches cannot be split over so many ranks, naming the counts that can.
    """
    zero = dict(zero or {"stage": 1})
    network = measure_network(recipe.backbone.name, lambda: _build(recipe), image_size=recipe.backbone.image_size)
    frozen = _teacher(teacher, recipe.backbone.image_size) if teacher else None
    extra: dict[str, float] = {}
    views: dict[str, float] = {}
    if recipe.method.name in ("dino", "lafs"):
        network, extra, views = _self_distillation(recipe, network)
    classes = num_classes or recipe.data.num_classes
    plans = {}
    for phase in recipe.phases:
        if phase.micro_batches % ranks:
            allowed = [r for r in range(1, phase.micro_batches + 1) if phase.micro_batches % r == 0]
            raise UserError(
                f"phase {phase.name!r}: {phase.micro_batches} micro-batches cannot be split over {ranks} ranks; "
                f"use one of {', '.join(map(str, allowed))}"
            )
        plans[phase.name] = plan(
            network,
            ranks=ranks,
            micro_batch=phase.micro_batch,
            accumulation=phase.micro_batches // ranks,
            stage=int(zero.get("stage", 1)),
            rows=_class_rows(recipe, phase, classes),
            device=device,
            precision=recipe.optimizer.precision,
            gradient_bytes=2 if recipe.optimizer.gradient_communication == "bfloat16" else 4,
            hierarchical=int(zero.get("zero_hpz_partition_size", 1)) > 1,
            overlap=zero.get("overlap_comm"),
            compiled=recipe.backbone.compile,
            offload_optimizer=_offloads(zero, "offload_optimizer"),
            offload_parameters=_offloads(zero, "offload_param"),
            bucket=int(float(_number(zero, "reduce_bucket_size", DEEPSPEED_BUCKET))),
            ema=recipe.ema is not None,
            teacher=frozen,
            extra={
                name: size * (phase.micro_batch if name == "prototype logits" else 1) for name, size in extra.items()
            },
            **views,
        )
    return plans


def _build(recipe: Recipe) -> Any:
    backbone = recipe.backbone
    return create_backbone(
        backbone.name,
        embedding_dim=backbone.embedding_dim,
        image_size=backbone.image_size,
        checkpoint_blocks=backbone.checkpoint_blocks,
        **backbone.overrides,
    )


def _teacher(build: Callable[[], nn.Module], image_size: int) -> Teacher:
    return Teacher(measure_network("teacher", build, image_size=image_size), forward_peak(build, image_size=image_size))


def _class_rows(recipe: Recipe, phase: Phase, num_classes: int | None) -> ClassRows | None:
    if recipe.classifier is None or recipe.method.name in ("dino", "lafs"):
        return None
    if num_classes is None:
        raise UserError(
            "data.num_classes is not in the recipe; give it (data.num_classes=...) to plan without the data"
        )
    classifier, method = recipe.classifier, recipe.method
    return ClassRows(
        num_classes,
        recipe.backbone.embedding_dim,
        sample_rate=phase.sample_rate,
        expectations=phase.expectation != "off" or method.name == "cluster",  # cluster keeps a centre a class
        shared_negatives=getattr(method, "expectation_negatives", "own") == "shared",
        optimizer=classifier.optimizer.name,
        mode=classifier.optimizer.mode,
        moments_bytes=2 if classifier.optimizer.moments == "bfloat16" else 4,
        in_backward=classifier.optimizer.in_backward,
        operand_bytes=2 if classifier.precision == "half" else 4,
        gather_bytes=2 if classifier.gather == "bfloat16" else 4,
        keep_mb=classifier.keep_mb,
    )


def _self_distillation(recipe: Recipe, network: Network) -> tuple[Network, dict[str, float], dict[str, float]]:
    """The student with its head, the teacher beside it whole on every rank, and one image's views: their logits, and what they cost a branch in
    whole pictures. A subset of a picture's landmarks costs its share of the patches; the landmark CNN's own passes are left out (1%)."""
    method: Any = recipe.method
    size = recipe.backbone.image_size
    seen = augmentation(recipe.data.augmentation)
    shares = {view.name: ((view.size or size) / size) ** 2 for view in seen if view.twin is None}
    if method.name == "lafs":
        patches = (size // recipe.backbone.overrides.get("patch", 8)) ** 2
        shares = dict.fromkeys(shares, min(1.0, method.landmarks / patches))
    views = {
        "views": sum(shares.values()),
        "teacher_views": float(sum(name.startswith("global") for name in shares)),
        "pictures": sum(((view.size or size) / size) ** 2 for view in seen),
    }
    widths = [recipe.backbone.embedding_dim, method.hidden, method.hidden, method.bottleneck, method.prototypes]
    head = sum(a * b for a, b in pairwise(widths))
    student = replace(
        network, parameters=network.parameters + head, largest=max(network.largest, widths[3] * widths[4])
    )
    extra = {
        "teacher": 4.0 * student.parameters,
        "prototype logits": _LOGIT_COPIES * 4.0 * len(shares) * method.prototypes,
    }
    return student, extra, views


def _offloads(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def _number(zero: Mapping[str, Any], key: str, default: float) -> float:
    value = zero.get(key, default)
    return default if value == "auto" else float(value)
