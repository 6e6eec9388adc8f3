"""Fine-tuning as users do it: class centres alone at first, frozen parts, class centres of arcface_torch's rank files.

What is trained is compared with a plain torch loop; what is frozen, to the bit.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from lvtrain.backbones import create_backbone
from lvtrain.checkpoint.reader import Weights, open_weights
from lvtrain.data import Loader, ShardDataset
from lvtrain.main import main
from lvtrain.methods import create_method
from lvtrain.recipe import files as recipes
from tests.conftest import ROOT
from tests.runs import events, metrics, output, recipe_file, run, tool
from tools.trial import contents

STEPS, HEAD_ONLY, GLOBAL, MICRO = 6, 3, 16, 4
LR, DECAY, CLIP, SCALE, MARGIN = 0.01, 1e-2, 0.5, 16.0, 0.2
SHAPE: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2}
FROZEN = ["blocks.0", "patch_embed"]


def pretrained(folder: Path) -> tuple[nn.Module, Path]:
    """A ViT with statistics of a trained network in its BatchNorm, and its file."""
    torch.manual_seed(1)
    backbone = create_backbone("vit_nano", embedding_dim=32, **SHAPE)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(backbone.state_dict(), folder / "pretrained.safetensors")
    return backbone, folder / "pretrained.safetensors"


def make(folder: Path, faces: Path, head_only: str, **changes: Any) -> Path:
    sections = {
        "data": {"block": 8, "augmentation": "none"},
        "backbone": {"name": "vit_nano", "embedding_dim": 32, "overrides": SHAPE},
        "classifier": {"margin": {"name": "cosface", "scale": SCALE, "m": MARGIN}, "optimizer": {"name": "sgd"}},
        "method": {"name": "classification", "frozen": FROZEN},
        "phases": [{"name": "all", "global_batch": GLOBAL, "micro_batches": GLOBAL // MICRO}],
        "optimizer": {"name": "sgd", "lr": LR, "weight_decay": DECAY, "clip": CLIP, "precision": "float32"},
        "schedule": {"total": f"{STEPS} steps", "warmup": "0 steps", "shape": "constant"},
        "checkpoint": {"every": f"{HEAD_ONLY} steps", "keep_last": 9},
        "init_from": {"path": str(pretrained(folder)[1]), "head_only": head_only},
    }
    return recipe_file(folder, faces / "train", **(sections | changes))


def checkpoint(recipe: Path, step: int) -> Weights:
    return open_weights(recipe.parent / "runs" / "tiny" / "checkpoints" / f"step_{step:09d}")


def centres(found: Weights) -> torch.Tensor:
    return found.reader.rows("classifier.weight", 0, 24)


def plain_loop(recipe: Path, backbone: nn.Module) -> tuple[dict[int, torch.Tensor], list[float]]:
    """The same training by torch alone: class centres by step, losses. `backbone` is trained in place."""
    read = recipes.load(recipe)
    rows = create_method(read, num_classes=24, device=torch.device("cpu")).classifier.weight.detach().clone()
    rows.requires_grad_()
    for name in FROZEN:
        backbone.get_submodule(name).requires_grad_(False)
    trained = {name: value for name, value in backbone.named_parameters() if value.requires_grad}
    plain = {
        n for n, value in trained.items() if value.ndim < 2 or n.split(".")[-1] in ("bias", "pos_embed", "mask_token")
    }
    groups = [
        {"params": [value for name, value in trained.items() if name not in plain], "weight_decay": DECAY},
        {"params": [trained[name] for name in sorted(plain)], "weight_decay": 0.0},
    ]
    optimizers = [
        torch.optim.SGD(groups, lr=LR, momentum=0.9),
        torch.optim.SGD([rows], lr=LR, momentum=0.9, weight_decay=DECAY),
    ]
    dataset = ShardDataset(read.data.path)
    kept, losses = {}, []
    with Loader(
        dataset,
        seed=read.seed,
        block=8,
        micro_batch=MICRO,
        micro_batches=GLOBAL // MICRO,
        augmentation="none",
        backend="torch",
    ) as batches:
        for step in range(STEPS):
            head_only = step < HEAD_ONLY
            backbone.train(not head_only)
            for name in FROZEN:
                backbone.get_submodule(name).eval()
            total = 0.0
            for _ in range(GLOBAL // MICRO):
                batch = next(batches)
                with torch.set_grad_enabled(not head_only):
                    embeddings = backbone(batch.images)
                cosines = F.normalize(embeddings) @ F.normalize(rows).T
                loss = F.cross_entropy(SCALE * (cosines - MARGIN * F.one_hot(batch.labels, 24)), batch.labels)
                (loss / (GLOBAL // MICRO)).backward()
                total += float(loss) / (GLOBAL // MICRO)
            if not head_only:
                nn.utils.clip_grad_norm_(trained.values(), CLIP)
                optimizers[0].step()
            optimizers[1].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses.append(total)
            kept[step + 1] = rows.detach().clone()
    return kept, losses


@pytest.mark.parametrize(("ranks", "zero"), [(1, 2), (2, 1), (2, 3)])
def test_class_centres_alone_and_then_all_but_the_frozen_parts(
    ranks: int, zero: int, tiny_faces: Path, tmp_path: Path
) -> None:
    recipe = make(tmp_path, tiny_faces, f"{HEAD_ONLY} steps")
    assert run(recipe, ranks=ranks, zero=zero) == 0, output(recipe)
    backbone, _ = pretrained(tmp_path / "again")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    expected, losses = plain_loop(recipe, backbone)
    for row, loss in zip(metrics(tmp_path / "runs" / "tiny"), losses, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert (row["grad_norm"] == 0) == (row["step"] <= HEAD_ONLY)
    first, last = checkpoint(recipe, HEAD_ONLY), checkpoint(recipe, STEPS)
    # statistics and all: to the bit
    assert all(torch.equal(first.backbone[name], value) for name, value in before.items())
    torch.testing.assert_close(centres(first), expected[HEAD_ONLY], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(centres(last), expected[STEPS], rtol=1e-3, atol=1e-5)
    for name, value in backbone.state_dict().items():
        if name.startswith(tuple(f"{part}." for part in FROZEN)):
            assert torch.equal(last.backbone[name], before[name]), name
            assert f"backbone.momentum_buffer.{name}" not in last.reader.names
        elif value.is_floating_point() and "running" not in name:
            assert name == "mask_token" or not torch.equal(last.backbone[name], before[name]), name  # never trained
            torch.testing.assert_close(last.backbone[name], value, rtol=1e-3, atol=1e-5)
    assert [row["step"] for row in events(tmp_path / "runs" / "tiny", "unfreeze")] == [HEAD_ONLY]


def test_a_stop_before_the_backbone_is_trained_changes_nothing(tiny_faces: Path, tmp_path: Path) -> None:
    """AdamW, layer decay and a moving average; an epoch has 15 steps. The same bits with and without the stop."""
    changes: dict[str, Any] = {
        "classifier": {},
        "optimizer": {"lr": 1e-3, "precision": "float32", "layer_decay": 0.8},
        "ema": {"decay": 0.5},
        "data": {"block": 8, "augmentation": "flip"},
        "schedule": {"total": "18 steps", "warmup": "2 steps"},
        "checkpoint": {"every": "15 steps", "keep_last": 9},
    }
    peaceful, stopped = (make(tmp_path / name, tiny_faces, "1 epochs", **changes) for name in ("peaceful", "stopped"))
    assert run(peaceful, ranks=2) == 0, output(peaceful)
    assert run(stopped, ranks=2, environment={"LVTRAIN_FAULT": "loop.step:0:13:sigterm"}) == 75, output(stopped)
    assert run(stopped, ranks=2) == 0, output(stopped)
    assert contents(tmp_path / "stopped" / "runs" / "tiny") == contents(tmp_path / "peaceful" / "runs" / "tiny")
    at_the_point, last = checkpoint(peaceful, 15), checkpoint(peaceful, 18)
    assert at_the_point.average is not None and last.average is not None
    assert all(torch.equal(value, at_the_point.backbone[name]) for name, value in at_the_point.average.items())
    assert float(at_the_point.reader.replicated("backbone.adam_step")) == 0
    assert float(last.reader.replicated("backbone.adam_step")) == 3
    moved = {name for name, value in last.average.items() if not torch.equal(value, at_the_point.average[name])}
    assert not any(name.startswith(tuple(FROZEN)) for name in moved) and "blocks.1.mlp.fc1.weight" in moved


def test_what_cannot_be_frozen_is_refused(tiny_faces: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(ROOT)
    every = ["blocks", "patch_embed", "pos_embed", "norm", "feature", "mask_token"]
    for frozen, said in ((["blocks.7"], "no part blocks.7"), (every, "leaves nothing")):
        recipe = make(tmp_path, tiny_faces, "1 epochs", method={"name": "classification", "frozen": frozen})
        assert main(["--recipe", str(recipe), "--ds_config", "ds_configs/zero2.json", "--dry-run"]) == 2
        assert said in capfd.readouterr().err


FORMATS = {
    "softmax_fc_gpu_{}.pt": lambda rows: {"weight": rows},
    "checkpoint_gpu_{}.pt": lambda rows: {
        "epoch": 3,
        "state_dict_backbone": {},
        "state_dict_softmax_fc": {"weight": rows},
    },
    "rank_{}_softmax_weight.pt": lambda rows: rows,
}


@pytest.mark.parametrize("file", FORMATS)
def test_class_centres_of_arcface_torchs_ranks_start_a_run(file: str, tiny_faces: Path, tmp_path: Path) -> None:
    """24 classes over 5 ranks: the first four hold one more."""
    rows = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    starts = [24 // 5 * rank + min(rank, 24 % 5) for rank in range(6)]
    files = []
    for rank, (start, stop) in enumerate(pairwise(starts)):
        files.append(tmp_path / file.format(rank))
        torch.save(FORMATS[file](rows[start:stop].clone()), files[-1])
    named = [word for path in files for word in ("--rank-file", path)]
    weights = pretrained(tmp_path)[1]
    done = tool("convert_checkpoint", "import", weights, tmp_path / "m", "--heads", 2, "--num-classes", 24, *named)
    assert done.exit_code == 0, done.output
    if not file.startswith("softmax"):
        return
    start = {"path": str(tmp_path / "m"), "classifier": "load"}
    recipe = make(tmp_path, tiny_faces, "1 epochs", init_from=start, schedule={"total": "1 steps", "warmup": "0 steps"})
    assert run(recipe, "optimizer.lr=1e-12", ranks=2) == 0, output(recipe)
    torch.testing.assert_close(centres(checkpoint(recipe, 1)), rows, rtol=1e-6, atol=1e-7)
    (event,) = events(tmp_path / "runs" / "tiny", "init_from")
    assert event["classifier"].startswith("24 class centres")
