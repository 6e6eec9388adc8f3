"""The cluster method through the front door: the same losses on one rank and on two, the bank carried over a restart on another number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lvtrain import load_model
from tests.runs import metrics, output, recipe_file, run

BATCH = {"global_batch": 16, "micro_batches": 4}


def cluster_recipe(folder: Path, data: Path, **method: Any) -> Path:
    return recipe_file(
        folder,
        data,
        classifier={"margin": {"name": "arcface", "scale": 32}},
        method=dict({"name": "cluster", "warmup": "2 steps", "clustering": "contrastive"}, **method),
        phases=[
            {"name": "first", **BATCH, "end": {"at_most": "4 steps"}},
            {"name": "second", **BATCH, "sample_rate": 0.5},
        ],
        schedule={"total": "8 steps", "warmup": "1 steps"},
    )


def test_front_door_trains_resumes_and_reports(tiny_faces: Path, tmp_path: Path) -> None:
    """One rank all the way; stopped between the phases; and the first phase on two ranks, the second on one."""
    ways: dict[str, list[tuple[int, tuple[str, ...]]]] = {
        "straight": [(1, ())],
        "stopped": [(1, ("--phase", "first")), (1, ("--phase", "second"))],
        "moved": [(2, ("--phase", "first")), (1, ("--phase", "second"))],
    }
    rows = {}
    for name, starts in ways.items():
        recipe = cluster_recipe(tmp_path / name, tiny_faces / "train", temperature="learnable", alpha=0.7, beta=0.5)
        for ranks, arguments in starts:
            assert run(recipe, *arguments, ranks=ranks) == 0, output(recipe)
        rows[name] = metrics(tmp_path / name / "runs" / "tiny")
    straight, stopped, moved = rows["straight"], rows["stopped"], rows["moved"]
    assert [row["step"] for row in straight] == list(range(1, 9)) == [row["step"] for row in moved]
    for row, again in zip(straight, stopped, strict=True):
        of_machine = {"time", "images_per_second", "data_wait"}
        assert {k: v for k, v in row.items() if k not in of_machine} == {
            k: v for k, v in again.items() if k not in of_machine
        }
    parts = ("loss_classification", "loss_clustering", "loss_aligning")
    for column in ("loss", "phi_mean", "phi_max", "margin_mean", "temperature", *parts):
        assert [row.get(column, 0.0) for row in moved] == pytest.approx(
            [row.get(column, 0.0) for row in straight], rel=2e-4
        ), column
    # the bank's warm-up: two steps of plain ArcFace, then all three losses
    assert "loss_clustering" not in straight[1] and straight[2]["loss_clustering"] > 0
    assert "loss_aligning" not in straight[1] and 0 < straight[2]["loss_aligning"] < 2
    for row in straight[2:]:
        classification, clustering, aligning = (row[part] for part in parts)
        assert row["loss"] == pytest.approx(classification + 0.7 * clustering + 0.5 * aligning, rel=1e-5)
    # the engine trains the temperature, and so it comes back with the backbone
    assert straight[7]["temperature"] != pytest.approx(0.07, rel=1e-6)
    # it is not part of the network that is evaluated
    (checkpoint,) = (tmp_path / "straight" / "runs" / "tiny" / "checkpoints").glob("*_000000008/rank_00000.safetensors")
    stored = load_file(checkpoint)
    for name, value in load_model(tmp_path / "straight" / "runs" / "tiny").backbone.named_parameters():
        assert torch.equal(value, stored[f"backbone.param.backbone.{name}"]), name
