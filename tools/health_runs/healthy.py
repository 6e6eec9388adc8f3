"""Healthy runs of every method, margin, optimizer and augmentation, and plateaus: nothing may be named in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# name -> (changes of the recipe, kind of data); sections are merged one level deep
_FVIT: dict[str, Any] = {
    "embedding_dim": 64,
    "overrides": {"dim": 32, "depth": 2, "heads": 2, "head_dim": 16, "mlp_dim": 64},
}
_DINO = {
    "prototypes": 256,
    "hidden": 64,
    "bottleneck": 32,
    "teacher_momentum": 0.99,
    "centre_momentum": 0.5,
    "teacher_temperature": 0.02,
    "teacher_temperature_start": 0.02,
    "freeze_last_layer": 0,
}
_SGD = {"optimizer": {"name": "sgd", "lr": 0.02, "weight_decay": 5e-4, "precision": "float32"}}
_DEEP = {  # stays on the first plateau for as long as this lasts
    "backbone": {"overrides": {"dim": 48, "depth": 8, "heads": 4, "patch": 10}},
    "schedule": {"total": "4000 steps", "warmup": "600 steps"},
}

HEALTHY: dict[str, tuple[dict[str, Any], str]] = {
    "pco, all classes": ({}, "plain"),
    "pco, sampled": ({"phases": [{"name": "alignment", "global_batch": 32, "sample_rate": 0.5}]}, "plain"),
    "pco, three phases": (
        {
            "phases": [
                {"name": "alignment", "global_batch": 32, "sample_rate": 0.5, "end": {"at_most": "60 steps"}},
                {
                    "name": "stabilisation",
                    "global_batch": 32,
                    "sample_rate": 0.5,
                    "expectation": "update",
                    "end": {"at_most": "60 steps"},
                },
                {"name": "refinement", "global_batch": 32, "expectation": "frozen"},
            ],
            "schedule": {"total": "200 steps", "warmup": "40 steps"},
        },
        "plain",
    ),
    "arcface": ({"classifier": {"margin": {"name": "arcface", "m": 0.5}}}, "plain"),
    "adaface, hard faces": ({"classifier": {"margin": {"name": "adaface"}}}, "hard"),
    "margin warm-up": ({"classifier": {"margin": {"name": "cosface", "m": 0.4, "warmup": "50 steps"}}}, "plain"),
    "plateau, small rate and long warm-up": (
        {"optimizer": {"lr": 3e-4}, "schedule": {"warmup": "1000 steps"}},
        "plain",
    ),
    "plateau, deep": (_DEEP, "hard"),
    "cluster": (
        {
            "method": {"name": "cluster", "warmup": "2 epochs"},
            "classifier": {"margin": {"name": "arcface"}},
            "phases": [{"name": "joint", "global_batch": 64, "micro_batches": 2}],
        },
        "plain",
    ),
    "dino": (
        {
            "method": {"name": "dino", **_DINO},
            "classifier": None,
            "backbone": {"name": "fvit_tiny", **_FVIT},
            "data": {"augmentation": "dino_faces_56"},
            "phases": [{"name": "pretraining", "global_batch": 16, "micro_batches": 2}],
            "optimizer": {"weight_decay": 0.04},
        },
        "plain",
    ),
    "part fvit": (
        {"method": {"name": "finetune"}, "backbone": {"name": "part_fvit_tiny", **_FVIT}},
        "plain",
    ),
    "lafs": (
        {
            "method": {"name": "lafs", **_DINO, "landmarks": 6, "landmark_weights": "{part fvit}"},
            "classifier": None,
            "backbone": {
                "name": "part_fvit_tiny",
                **_FVIT,
                "overrides": {**_FVIT["overrides"], "freeze_landmarks": True},
            },
            "data": {"augmentation": "lafs_56"},
            "phases": [{"name": "pretraining", "global_batch": 16, "micro_batches": 2}],
        },
        "plain",
    ),
    "fine-tuning": (
        {
            "method": {"name": "finetune"},
            "init_from": {"path": "{pco, all classes}", "classifier": "means"},
            "schedule": {"warmup": "0 steps"},
            "optimizer": {"lr": 1e-4, "layer_decay": 0.58},
            "data": {"augmentation": "randaugment"},
        },
        "hard",
    ),
    "fine-tuning, head first": (
        {
            "method": {"name": "finetune"},
            "init_from": {"path": "{pco, all classes}", "head_only": "50 steps"},
            "optimizer": {"lr": 1e-4},
        },
        "hard",
    ),
    "distillation": (
        {"method": {"name": "classification", "distill": {"teacher": "{pco, all classes}", "weight": 0.9}}},
        "plain",
    ),
    "iresnet, sgd": (
        {
            "backbone": {"name": "iresnet18", "overrides": {"layers": [1, 1, 1, 1]}},
            "phases": [{"name": "alignment", "global_batch": 16}],
            **_SGD,
        },
        "plain",
    ),
    "mobilefacenet": ({"backbone": {"name": "mobilefacenet", "overrides": {}}, **_SGD}, "plain"),
    "bfloat16, average": ({"optimizer": {"precision": "bfloat16"}, "ema": {"decay": 0.99}}, "plain"),
    "augmentation strong": ({"data": {"augmentation": "strong"}}, "plain"),
    "augmentation arcface, uneven": ({"data": {"augmentation": "arcface"}}, "uneven"),
    "grey faces": ({}, "grey"),
    "two ranks, accumulated": (
        {"phases": [{"name": "alignment", "global_batch": 64, "micro_batches": 4}]},
        "plain",
    ),
}


def healthy_runs(seed: int, only: list[str], folder: Path) -> list[Any]:
    """The runs, in an order in which those that others start from come first."""
    from tools.health import RECIPE, Run, _slug, make_data

    runs = []
    for name, (changes, kind) in HEALTHY.items():
        if only and not any(word in name for word in only):
            continue
        values = json.loads(json.dumps(RECIPE))
        for key, value in changes.items():
            merge = isinstance(value, dict) and isinstance(values.get(key), dict) and key != "method"
            values[key] = {**values[key], **value} if merge else value
        text = json.dumps(values)
        for other in HEALTHY:
            source = folder / _slug(Run(other, seed, {}, folder)) / "run"
            text = text.replace("{" + other + "}", str(source))
        runs.append(Run(name, seed, json.loads(text), make_data(folder / "data", seed, kind)))
    return runs
