"""Backbones under DeepSpeed and torch.compile; operators the host would have to wait for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from lvtrain.backbones import create_backbone
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.runs import metrics, recipe_file
from tools.benchmarks.waits import host_waits

SMALL: dict[str, Any] = {"depth": 2, "dim": 64, "heads": 2, "drop_path": 0.2, "mask_ratio": 0.3, "embedding_dim": 16}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("vit_nano", SMALL), ("part_fvit_tiny", {"depth": 1}), ("iresnet18", {"image_size": 32})],
)
@pytest.mark.parametrize("mode", ["none", "block"])
def test_forward_and_backward_never_wait_for_the_device(name: str, overrides: dict[str, Any], mode: str) -> None:
    backbone = create_backbone(name, checkpoint_blocks=mode, **overrides).train()
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    with host_waits(torch.device("cpu")) as waits, torch.autocast("cpu", torch.bfloat16):
        backbone(images).square().mean().backward()
    assert not waits


def _waits_in_training(rank: int, world_size: int, recipe: str) -> dict[str, list[dict[str, int]]]:
    from lvtrain import main
    from lvtrain.classifier import sharded
    from lvtrain.classifier.sampling import sampled_classes
    from lvtrain.training.phase_state import PhaseState
    from lvtrain.training.trainer import Trainer

    found: dict[str, list[dict[str, int]]] = {}
    step = Trainer.step

    def counted(self: Trainer, phase: PhaseState, batches: Any) -> bool:
        with host_waits(torch.device("cpu")) as waits:
            reached = step(self, phase, batches)
        found.setdefault(phase.section.name, []).append(dict(waits))
        return reached

    def uncounted(*arguments: Any) -> torch.Tensor | None:
        with _disable_current_modes():
            return sampled_classes(*arguments)

    sharded.sampled_classes = uncounted  # type: ignore[attr-defined]
    Trainer.step = counted  # type: ignore[method-assign]
    assert (
        main.main(["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / "zero2.json"), "method.window=100"])
        == 0
    )
    return found


def test_a_training_step_never_waits_for_the_device(tiny_faces: Path, tmp_path: Path) -> None:
    """The real loop, PCO's three phases under ZeRO-2.

    The choice of classes works on the host's labels, so its operators are not counted; on the fake device it does not wait
    either (tests/test_cuda_training.py). What remains are the bank's samples and classes, also from the host's labels.
    """
    (found,) = run_ranks(1, _waits_in_training, str(recipe_file(tmp_path, tiny_faces / "train")))
    assert found == {
        "alignment": [{}] * 4,
        "stabilisation": [{"index by mask": 1, "_unique2": 1}] * 4,
        "refinement": [{}] * 4,
    }


def _waits_in_the_steady_state(rank: int, world_size: int, stage: int) -> dict[str, int]:
    """Of one more step when all is warm; on a GPU torch raises at the first wait it knows of."""
    from lvtrain.distributed import world as worlds
    from tools.benchmarks.step import SMALL as OPTIONS
    from tools.benchmarks.step import _Step

    worlds.stop()  # the group of `run_ranks` is gloo's
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.pop(name, None)  # a plain process: it takes a free port, where a launcher's would be 29500
    world = worlds.start()
    shape = OPTIONS | {"batch": 4, "classes": 64, "accumulation": 2, "stage": stage}
    del shape["steps"]
    rest = {
        "sample_rate": 1.0,
        "expectations": False,
        "as_ranks": 1,
        "compile": False,
        "checkpoint_blocks": "none",
        "data": None,
    }
    step = _Step(world, **shape, **rest)
    for _ in range(3):
        step(None)
    if world.device.type == "cpu":
        with host_waits(world.device) as waits:
            step(None)
        return dict(waits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(None)
        step(None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nobody_waits_in_the_steady_state(device: str, stage: int) -> None:
    """Two micro-batches through DeepSpeed, classifier, both optimizers, BatchNorm's statistics: without data, whose threads do wait."""
    assert run_ranks(1, _waits_in_the_steady_state, stage) == [{}]


def _zero_losses(rank: int, world_size: int) -> dict[tuple[int, str], list[float]]:
    return {key: _losses(rank, *key) for key in ((1, "none"), (3, "none"), (3, "activation"), (3, "block"))}


def _losses(rank: int, stage: int, mode: str) -> list[float]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    backbone = create_backbone("vit_nano", checkpoint_blocks=mode, **SMALL)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(
        [parameter for parameter in backbone.parameters() if parameter.requires_grad], lr=1e-3
    )
    engine, *_ = deepspeed.initialize(model=backbone, optimizer=optimizer, config=config)
    losses = []
    for step in range(3):
        torch.manual_seed(100 + 10 * step + rank)
        loss = (engine(torch.randn(4, 3, 112, 112)) ** 3).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with torch.no_grad():  # weights are whole inside the module's own call, for `tokens` too
        assert engine.module.tokens(torch.randn(4, 3, 112, 112))[0].shape == (4, 49, 64)
    engine.destroy()
    return losses


def test_losses_are_the_same_under_zero_1_and_3() -> None:
    """Two ranks, parameters really partitioned (no persistence threshold), with and without recomputation. Biases are zero in the first step only."""
    for found in run_ranks(2, _zero_losses):
        for key, losses in found.items():
            assert losses == pytest.approx(found[1, "none"], rel=1e-5), key


def _trained_losses(rank: int, world_size: int, recipe: str, compile: bool) -> list[float]:
    from lvtrain import main

    name = "compiled" if compile else "eager"
    overrides = [f"name={name}", f"backbone.compile={compile}", "backbone.overrides.drop_path=0"]
    arguments = ["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / "zero2.json"), "--phase", "alignment"]
    assert main.main([*arguments, *overrides]) == 0
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compile
    return [row["loss"] for row in metrics(Path(recipe).parent / "runs" / name)]


@pytest.mark.slow
def test_a_compiled_backbone_trains_as_the_eager_one(tiny_faces: Path, tmp_path: Path) -> None:
    """The recipe's switch, in the real loop; drop path is off because a compiled network draws other numbers from the same seed."""
    recipe = str(recipe_file(tmp_path, tiny_faces / "train"))
    (eager,), (compiled,) = (run_ranks(1, _trained_losses, recipe, compile) for compile in (False, True))
    assert len(eager) == 4 and compiled == pytest.approx(eager, rel=1e-4)
