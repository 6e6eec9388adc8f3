"""Landmarks and attention in the report: of a real run, and only on faces that may be shown."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lvtrain.backbones import create_backbone
from lvtrain.backbones.landmarks.patches import grid_landmarks
from lvtrain.report import write_report
from lvtrain.report.attention import class_attention
from tests.runs import output, recipe_file, run

SMALL = {"dim": 16, "depth": 2, "heads": 2, "head_dim": 8, "mlp_dim": 32, "patch": 16}


@pytest.mark.parametrize("name", ["fvit_tiny", "part_fvit_tiny"])
def test_attention_is_what_the_last_block_does(name: str) -> None:
    """Its rows weigh the last block's values to the attention output that block computes (scaled_dot_product_attention's, not ours)."""
    torch.manual_seed(0)
    backbone = create_backbone(name, embedding_dim=16, **SMALL).eval()
    for parameter in backbone.parameters():  # larger weights than the initial ones, so that attention is not flat
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    images = torch.rand(3, 3, 112, 112) * 2 - 1
    attention_module = backbone.transformer.layers[-1][0].fn.fn  # type: ignore[union-attr, index]
    seen = {}
    attention_module.register_forward_hook(lambda module, inputs, result: seen.update(x=inputs[0], y=result))
    weights, points = class_attention(backbone, images)  # type: ignore[arg-type]
    assert weights.shape == (3, 2, 49) and points.shape == (3, 49, 2)
    assert float((weights.max(2).values / weights.mean(2)).max()) > 1.05, "not flat"

    value = attention_module.to_qkv(seen["x"]).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)[2]
    own = 1 - weights.sum(-1, keepdim=True)
    mixed = (torch.cat([own, weights], dim=2)[:, :, None] @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention_module.to_out(mixed)[:, 0], seen["y"][:, 0], rtol=1e-4, atol=1e-5)
    if name == "fvit_tiny":
        assert torch.equal(points[1], grid_landmarks(7, 16))


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_report_of_a_part_fvit_run(tiny_faces: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_faces / "train", data)
    path = recipe_file(
        tmp_path,
        data,
        backbone={"name": "part_fvit_tiny", "embedding_dim": 16, "overrides": SMALL},
        method={"name": "finetune"},
        phases=[{"name": "only", "global_batch": 8, "micro_batches": 2}],
        optimizer={"lr": 0.05},
        schedule={"total": "4 steps", "warmup": "0 steps"},
        checkpoint={"every": "2 steps"},
    )
    assert run(path) == 0, output(path)
    folder = tmp_path / "runs" / "tiny"
    page = write_report(folder).read_text()
    landmarks, attention = pictures(page)
    rows = 2 * (160 + 22)
    assert landmarks.shape == attention.shape == (rows, 6 * 166 - 6, 4)
    assert "step" in page and not np.array_equal(landmarks[22:182], landmarks[204:364]), (
        "two checkpoints, landmarks moved"
    )
    assert page == write_report(folder).read_text()

    described = json.loads((data / "dataset.json").read_text())  # as in a packed dataset of photographs
    described["provenance"] = {"kind": "folder"}
    (data / "dataset.json").write_text(json.dumps(described))
    page = write_report(folder).read_text()
    assert pictures(page) == [] and "--faces" in page
    assert len(pictures(write_report(folder, any_faces=True).read_text())) == 2

    shutil.rmtree(data)
    page = write_report(folder).read_text()
    assert pictures(page) == [] and "No faces are drawn" in page
