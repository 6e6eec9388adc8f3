"""Every method trains on CUDA without a GPU (tests/fakecuda), and a step waits for the device only once.

Kernels do nothing there, so these tests look at exit codes, device mix-ups, files and waits, not at numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.fakecuda.device import Ended, FakeDevice
from tests.fakecuda.waits import waits_of_ours
from tests.runs import events, metrics, recipe_file

pytestmark = pytest.mark.fakecuda

VERDICT = "engine/engine.py:receive"  # whether the step was finite
CSS = "training/schedule.py:observe"  # PCO's cosine, once a window
BATCH = {"global_batch": 16, "micro_batches": 4}
ON_GPU = {"backend": "torch"}  # DALI contains another CUDA runtime, which finds no GPU here


def train(device: FakeDevice, recipe: Path, *arguments: str, ds_config: str = "zero1") -> Ended:
    front_door = ["--recipe", str(recipe), "--ds_config", f"ds_configs/{ds_config}.json", *arguments]
    ended = device.call("lvtrain.main:main", front_door, folder=recipe.parent)
    assert ended.code == 0, ended.output[-4000:]
    return ended


@pytest.mark.parametrize("ds_config", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_pco_trains_evaluates_saves_and_resumes(
    fake_device: FakeDevice, tiny_faces: Path, tmp_path: Path, ds_config: str
) -> None:
    recipe = recipe_file(
        tmp_path,
        tiny_faces / "train",
        data=ON_GPU,
        ema={"decay": 0.9},
        optimizer={"precision": "bfloat16"},
        classifier={"numerics": {"precision": "half", "kernel": "triton"}},
        evaluation={"benchmarks": {"heldout": str(tiny_faces / "heldout.bin")}},
    )
    train(fake_device, recipe, "--phase", "alignment", ds_config=ds_config)
    ended = train(fake_device, recipe, ds_config=ds_config)
    run = tmp_path / "runs" / "tiny"
    assert [row["step"] for row in metrics(run)] == list(range(1, 13))
    assert all(row["memory_gb"] > 0 and row["nonfinite"] == 0 for row in metrics(run))
    assert len(events(run, "resume")) == 1 and (run / "evaluation" / "final.json").exists()
    waited = waits_of_ours(ended.trace())
    if ds_config == "zero3_offload":  # the optimizer is on the host: it reads the loss and the norm there
        assert waited.pop("engine/engine.py:step") == 6 * 12
    assert waited == {VERDICT: 12, CSS: 6}


SETTINGS = yaml.safe_load((ROOT / "tools" / "studies" / "cluster.yaml").read_text())["settings"]


# triplets are chosen by pytorch-metric-learning on the host, from numbers that this device has not
@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting != "triplet"])
def test_every_setting_of_the_cluster_method(
    fake_device: FakeDevice, tiny_faces: Path, tmp_path: Path, setting: str
) -> None:
    options = {name.removeprefix("method."): value for name, value in SETTINGS[setting].items()}
    recipe = recipe_file(
        tmp_path,
        tiny_faces / "train",
        data=ON_GPU,
        classifier={"margin": {"name": "arcface", "scale": 32}},
        method={"name": "cluster", "warmup": "1 steps", **options},
        phases=[{"name": "joint", **BATCH, "sample_rate": 0.5}],
        schedule={"total": "3 steps", "warmup": "1 steps"},
        checkpoint={"every": "100 steps"},
    )
    assert waits_of_ours(train(fake_device, recipe).trace()) == {VERDICT: 3}


SMALL_PART = {"dim": 32, "depth": 2, "heads": 2, "head_dim": 16, "mlp_dim": 64}
HEAD = {"prototypes": 64, "hidden": 32, "bottleneck": 16, "freeze_last_layer": 0}


def landmark_recipe(folder: Path, faces: Path, method: dict[str, Any], augmentation: str, **changes: Any) -> Path:
    fixed = {"freeze_landmarks": True} if method["name"] == "lafs" else {}
    rest: dict[str, Any] = {
        "backbone": {"name": "part_fvit_tiny", "embedding_dim": 32, "image_size": 56, "overrides": SMALL_PART | fixed},
        "phases": [{"name": "only", "global_batch": 8, "micro_batches": 2}],
        "schedule": {"total": "3 steps", "warmup": "1 steps"},
        "optimizer": {"precision": "bfloat16"},
    }
    data = ON_GPU | {"augmentation": augmentation}
    return recipe_file(folder, faces / "train", data=data, method=method, **rest | changes)


def test_dino(fake_device: FakeDevice, tiny_faces: Path, tmp_path: Path) -> None:
    backbone = {"name": "fvit_tiny", "embedding_dim": 32, "image_size": 56, "overrides": SMALL_PART}
    recipe = landmark_recipe(tmp_path, tiny_faces, {"name": "dino", **HEAD}, "dino_faces_56", backbone=backbone)
    assert waits_of_ours(train(fake_device, recipe).trace()) == {VERDICT: 3}


def test_part_fvit_then_lafs_then_anchored_fine_tuning(
    fake_device: FakeDevice, tiny_faces: Path, tmp_path: Path
) -> None:
    """Each starts from the weights of the one before: landmark CNN, then backbone and landmarks."""
    supervised = tmp_path / "supervised" / "runs" / "tiny"
    recipe = landmark_recipe(tmp_path / "supervised", tiny_faces, {"name": "finetune", "landmarks": "trained"}, "flip")
    assert waits_of_ours(train(fake_device, recipe).trace()) == {VERDICT: 3}

    lafs = {"name": "lafs", **HEAD, "landmarks": 9, "landmark_weights": str(supervised)}
    recipe = landmark_recipe(tmp_path / "lafs", tiny_faces, lafs, "lafs_56")
    assert waits_of_ours(train(fake_device, recipe).trace()) == {VERDICT: 3}

    init_from = {"path": str(tmp_path / "lafs" / "runs" / "tiny"), "classifier": "fresh"}
    anchored = {"name": "finetune", "landmarks": "anchored", "beta": 0.1}
    recipe = landmark_recipe(tmp_path / "tuned", tiny_faces, anchored, "randaugment", init_from=init_from)
    assert waits_of_ours(train(fake_device, recipe).trace()) == {VERDICT: 3}


def test_distillation_and_fine_tuning_from_a_run(fake_device: FakeDevice, tiny_faces: Path, tmp_path: Path) -> None:
    short: dict[str, Any] = {
        "data": ON_GPU,
        "phases": [{"name": "only", **BATCH}],
        "schedule": {"total": "2 steps", "warmup": "1 steps"},
    }
    first = recipe_file(tmp_path / "first", tiny_faces / "train", **short)
    train(fake_device, first)
    run = str(tmp_path / "first" / "runs" / "tiny")
    distill = {"name": "pco", "window": 2, "distill": {"teacher": run, "weight": 0.9}}
    student = recipe_file(tmp_path / "student", tiny_faces / "train", method=distill, **short)
    assert waits_of_ours(train(fake_device, student).trace()) == {VERDICT: 2, CSS: 1}
    # class centres from the mean embeddings of the images, computed on the device before the first step
    tuned = recipe_file(
        tmp_path / "tuned", tiny_faces / "train", init_from={"path": run, "classifier": "means"}, **short
    )
    assert waits_of_ours(train(fake_device, tuned).trace()) == {VERDICT: 2, CSS: 1}


def test_a_compiled_backbone(fake_device: FakeDevice, tiny_faces: Path, tmp_path: Path) -> None:
    """Inductor's Triton kernels are compiled for sm_90 and launched, forward and backward."""
    recipe = recipe_file(
        tmp_path,
        tiny_faces / "train",
        data=ON_GPU,
        backbone={"compile": True},
        optimizer={"precision": "bfloat16"},
        phases=[{"name": "only", **BATCH}],
        schedule={"total": "2 steps", "warmup": "1 steps"},
    )
    trace = train(fake_device, recipe).trace()
    assert waits_of_ours(trace) == {VERDICT: 2, CSS: 1}
    assert any(call.kind == "launch" and call.text.startswith("triton_") for call in trace)
