"""The parts of the proof, most important first.

A figure of time or speed comes from a subject of `tools/benchmark.py`. `small` is the rehearsal on a device without time.
"""

from __future__ import annotations

from typing import Any

from tools.proof.part import Goal, Part

_MODEL = ("timm", "numpy", "pydantic")
_TRAINER = (*_MODEL, "deepspeed", "yaml", "cv2", "safetensors", "simplejpeg", "sklearn")
_SMALL: dict[str, Any] = {"name": "vit_nano", "batch": 8, "steps": 2, "profiled": False}


def _same(what: str, resumed: str) -> tuple[Goal, Goal]:
    return (
        Goal(f"{what}, 40 steps twice: the same bits", "same_twice", at_least=1),
        Goal(f"{what}, {resumed}: the same bits", "same_resumed", at_least=1),
    )


PARTS = [
    Part("environment", "What is installed, and does torch see the GPU?", "environment", seconds=60),
    Part(
        "self_test",
        "Do the Triton kernels compute what the torch path computes?",
        "self_test",
        seconds=90,
        needs=("triton", *_MODEL),
        goals=(
            Goal("the kernels pass their self-test", "passes", at_least=1),
            Goal("the self-test takes at most 2 s, once the device is awake", "seconds", at_most=2.0),
        ),
    ),
    Part(
        "kernel_tests",
        "Do the kernels pass their tests on this GPU?",
        "tests",
        {"files": ["test_classifier_kernels", "test_classifier_optimizer_triton"], "arguments": []},
        {"arguments": ["--collect-only"]},
        seconds=120,
        needs=("pytest", "triton", *_MODEL),
        goals=(Goal("no test of the kernels fails", "failed", at_most=0),),
    ),
    Part(
        "gpu_tests",
        "Do the tests that need a GPU pass?",
        "tests",
        {
            "files": [
                "test_classifier_sharded",
                "test_classifier_side_stream",
                "test_classifier_sampling",
                "test_backbones_engine",
                "test_data_loader",
            ],
            "arguments": ["-m", "gpu"],
        },
        {"files": ["test_classifier_sampling"], "arguments": ["-m", "gpu", "--collect-only"]},
        seconds=150,
        needs=("pytest", *_MODEL),
        goals=(Goal("no test that needs a GPU fails", "failed", at_most=0),),
    ),
    Part(
        "repeated",
        "Do backbone, classifier and optimizers repeat bit for bit, without DeepSpeed?",
        "repeated",
        {"name": "vit_s", "batch": 128, "classes": 20_000, "steps": 40},
        {"name": "vit_nano", "batch": 8, "classes": 100, "steps": 4},
        needs=_MODEL,
        goals=_same("backbone and classifier", "moved to new objects after 20 steps"),
    ),
    Part(
        "trained",
        "Does a training repeat and resume bit for bit?",
        "trained",
        {"identities": 200, "images": 10, "steps": 40},
        {"identities": 24, "images": 4, "steps": 4, "dali": False},
        seconds=120,
        needs=(*_TRAINER, "typer", "rich"),
        goals=_same("a training", "stopped after 10 steps and resumed"),
    ),
    Part(
        "classifier",
        "How fast is the classifier, one rank's part of 64?",
        "benchmark",
        {
            "subject": "classifier",
            "device": "cuda",
            "batch": 24_576,
            "classes": 32_186,
            "precisions": "half",
            "kernels": "torch,triton",
            "kept": True,
            "memory": False,
            "materialised": False,
        },
        {"batch": 64, "classes": 500, "repeats": 1},
        needs=("triton", *_MODEL),
        goals=(
            Goal(
                "forward and backward of 24,576 x 32,186 x 512, ms: at most 8 (H200)",
                "variants/lvtrain half triton kept/ms",
                at_most=8.0,
            ),
            Goal("the same, ms: at most 5.5 (H200)", "variants/lvtrain half triton kept/ms", at_most=5.5),
        ),
    ),
    Part(
        "backbone_eager",
        "What share of the GPU's matmul rate does ViT-L reach?",
        "benchmark",
        {"subject": "backbone", "device": "cuda", "name": "vit_l", "batch": 384},
        _SMALL,
        needs=_MODEL,
        goals=(Goal("ViT-L, batch 384: MFU at least 50%", "mfu", at_least=0.5),),
    ),
    Part(
        "backbone_compiled",
        "And compiled?",
        "benchmark",
        {"subject": "backbone", "device": "cuda", "name": "vit_l", "batch": 384, "compile": True},
        _SMALL | {"compile": False},
        seconds=180,
        needs=("triton", *_MODEL),
        goals=(Goal("ViT-L, batch 384, compiled: MFU at least 60%", "mfu", at_least=0.6),),
    ),
    Part(
        "backbone_checkpointed",
        "What does recomputing activations cost, and save?",
        "benchmark",
        {"subject": "backbone", "device": "cuda", "name": "vit_l", "batch": 384, "checkpoint_blocks": "activation"},
        _SMALL,
        needs=_MODEL,
    ),
    Part(
        "step_rates",
        "What do all classes cost (r = 1) beside a tenth of them?",
        "step_rates",
        {"name": "vit_l", "batch": 384, "classes": 2_059_906, "as_ranks": 64, "profiled": False},
        _SMALL | {"classes": 1000, "as_ranks": 4},
        seconds=150,
        needs=(*_MODEL, "deepspeed"),
        goals=(
            Goal("r = 1 keeps at least 95% of the speed of r = 0.1", "all_by_tenth", at_least=0.95),
            Goal("waits of the host in a step, but for its verdict: none", "host_waits", at_most=0),
        ),
    ),
    Part(
        "step_stages",
        "Does a step run under ZeRO 1, 2 and 3, and how fast?",
        "step_stages",
        {"name": "vit_b", "batch": 384, "classes": 100_000, "profiled": False},
        _SMALL | {"classes": 1000},
        seconds=150,
        needs=(*_MODEL, "deepspeed"),
    ),
    Part(
        "data_path",
        "Does DALI on the GPU give the torch path's pixels, and which is faster?",
        "data_path",
        {"images": 4000, "batch": 384, "batches": 60},
        {"images": 64, "batch": 8, "batches": 4, "backends": ["torch"]},
        seconds=90,
        needs=("numpy", "nvidia.dali", "cv2", "simplejpeg", "PIL"),
        goals=(Goal("mean difference of pixels from the torch path, of 255: at most 3", "difference", at_most=3.0),),
    ),
    Part(
        "data_wait",
        "Does a step wait for data?",
        "data_wait",
        {"name": "vit_s", "batch": 384, "identities": 500, "images": 24, "profiled": False},
        _SMALL | {"identities": 24, "images": 4, "dali": False},
        seconds=120,
        needs=(*_TRAINER, "typer", "rich"),
        goals=(Goal("data wait below 2% of a step", "data_wait_share", at_most=0.02),),
    ),
    Part(
        "pco",
        "Does PCO learn to verify unseen identities?",
        "pco",
        {"identities": 500, "images": 24, "steps": 700},
        {"identities": 24, "images": 4, "steps": 6, "dali": False},
        seconds=240,
        needs=(*_TRAINER, "typer", "rich"),
        goals=(Goal("verification on 3,000 pairs of unseen identities: at least 95%", "accuracy", at_least=0.95),),
    ),
]
