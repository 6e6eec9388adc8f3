"""Training with LAFS's fine-tuning augmentation and mixup, compared with a plain torch loop with timm's soft targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from lvtrain.data import Loader, ShardDataset
from lvtrain.methods import create_method
from lvtrain.methods.finetune import Mixup
from lvtrain.recipe import files as recipes
from tests.runs import metrics, output, recipe_file, run
from tools.trial import contents

STEPS, MICRO, ACCUMULATED, CLASSES, LR, CLIP, SCALE, MARGIN = 8, 4, 4, 24, 0.02, 0.5, 16.0, 0.2
MIXUP = {"alpha": 0.8, "probability": 0.5}


def make(folder: Path, faces: Path) -> Path:
    return recipe_file(
        folder,
        faces / "train",
        data={"augmentation": "lafs_finetune"},
        backbone={"overrides": {"dim": 32, "depth": 2, "heads": 2, "drop_path": 0.0, "mask_ratio": 0.0}},
        classifier={"margin": {"name": "cosface", "scale": SCALE, "m": MARGIN}, "optimizer": {"name": "sgd"}},
        method={"name": "finetune", "mixup": MIXUP},
        phases=[{"name": "all", "global_batch": MICRO * ACCUMULATED, "micro_batches": ACCUMULATED}],
        optimizer={"name": "sgd", "lr": LR, "weight_decay": 0.0, "clip": CLIP},
        schedule={"total": f"{STEPS} steps", "warmup": "0 steps", "shape": "constant"},
        checkpoint={"every": "2 steps", "keep_last": 9},
    )


def plain_losses(recipe: Path, shares: list[float]) -> list[float]:
    """The losses of the same training, by torch and timm alone."""
    read = recipes.load(recipe)
    method: Any = create_method(read, num_classes=CLASSES, device=torch.device("cpu"))
    backbone, rows = method.backbone.train(), nn.Parameter(method.classifier.weight.detach().clone())
    optimizer = torch.optim.SGD([*backbone.parameters(), rows], lr=LR, momentum=0.9)
    losses = []
    with Loader(
        ShardDataset(read.data.path),
        seed=read.seed,
        block=read.data.block,
        micro_batch=MICRO,
        micro_batches=ACCUMULATED,
        augmentation="lafs_finetune",
        backend=read.data.backend,
        image_size=read.backbone.image_size,
    ) as batches:
        for share in shares:
            total = 0.0
            for _ in range(ACCUMULATED):
                batch = next(batches)
                own = F.one_hot(batch.labels, CLASSES).float()
                soft = share * own + (1 - share) * own.flip(0)
                embeddings = backbone(share * batch.images + (1 - share) * batch.images.flip(0))
                logits = SCALE * (F.normalize(embeddings) @ F.normalize(rows).T - MARGIN * soft)
                loss = SoftTargetCrossEntropy()(logits, soft)
                (loss / ACCUMULATED).backward()
                total += loss.item() / ACCUMULATED
            nn.utils.clip_grad_norm_(backbone.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses


def test_mixup_trains_as_a_plain_loop_on_any_ranks_and_resumes_exactly(tiny_faces: Path, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", tiny_faces)
    shares = [Mixup(**MIXUP).share(recipes.load(whole).seed, step) for step in range(STEPS)]
    assert 2 <= sum(share < 1 for share in shares) < STEPS and min(shares) < 0.9
    expected = pytest.approx(plain_losses(whole, shares), rel=2e-4)

    def losses(recipe: Path) -> list[float]:
        return [row["loss"] for row in metrics(recipe.parent / "runs" / "tiny")]

    assert run(whole, ranks=2) == 0, output(whole)
    assert losses(whole) == expected
    alone, halves = (make(tmp_path / name, tiny_faces) for name in ("alone", "halves"))
    assert run(alone) == 0, output(alone)
    assert losses(alone) == expected
    assert run(halves, ranks=2, environment={"LVTRAIN_FAULT": "loop.step:0:5:sigterm"}) == 75, output(halves)
    assert run(halves, ranks=2) == 0, output(halves)
    assert contents(halves.parent / "runs" / "tiny") == contents(whole.parent / "runs" / "tiny")
