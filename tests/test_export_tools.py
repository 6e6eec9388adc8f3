"""tools/convert_checkpoint.py and tools/evaluate.py as a user starts them, on a run of the real trainer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lvtrain.export.packages import merge_rows
from lvtrain.weights import load_model
from lvtrain.weights.reading import read_weights
from tests.conftest import ROOT
from tests.runs import output, recipe_file, run, tool


def convert(*arguments: str | Path, code: int = 0) -> str:
    done = tool("convert_checkpoint", *arguments)
    assert done.exit_code == code, done.output
    return done.output


def evaluate(model: Path, out: Path, *arguments: str) -> dict[str, Any]:
    done = tool("evaluate", model, "--cpu", *arguments, "-o", out)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())["benchmarks"]
    return found


@pytest.fixture(scope="module")
def trained(tiny_faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: ZeRO-3 on 2 ranks, embeddings of 512 as clients want."""
    folder = tmp_path_factory.mktemp("trained")
    heldout = {"benchmarks": {"heldout": str(tiny_faces / "heldout.bin")}}
    recipe = recipe_file(folder, tiny_faces / "train", evaluation=heldout, backbone={"embedding_dim": 512})
    assert run(recipe, ranks=2, zero=3) == 0, output(recipe)
    return folder / "runs" / "tiny"


def test_a_run_consolidates_and_evaluates_to_the_live_figures(trained: Path, tiny_faces: Path, tmp_path: Path) -> None:
    """Consolidated without ranks, it gives the accuracy the run itself measured; so does every other form it is brought to."""
    live = json.loads((trained / "evaluation" / "final.json").read_text())["benchmarks"]["heldout"]
    command = [sys.executable, "tools/convert_checkpoint.py", "consolidate", trained, tmp_path / "model", "--rows"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # a process without a process group
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| heldout | {100 * live['accuracy']:.2f} ±" in card and "micro_batches: 4" in card
    assert "which these weights inherit: CC0-1.0 (generated" in card and "Intended use" in card
    convert("export", trained, tmp_path / "model.pt", "--to", "arcface")
    assert "largest difference" in convert("export", tmp_path / "model", tmp_path / "model.onnx")
    checkpoint = max((trained / "checkpoints").iterdir())
    heldout = f"heldout:{tiny_faces / 'heldout.bin'}"
    for form in (tmp_path / "model", checkpoint):
        assert evaluate(form, tmp_path / "out", "--benchmark", heldout)["heldout"]["accuracy"] == live["accuracy"]
    few = torch.rand(8, 3, 112, 112) * 2 - 1
    expected = load_model(tmp_path / "model").forward(few)
    assert torch.equal(load_model(trained).forward(few), expected)
    assert torch.allclose(load_model(tmp_path / "model.onnx").forward(few), expected, atol=1e-4)
    # .pt says nothing of heads where the shape is not a published one; the tensors are the same
    again, own = read_weights(tmp_path / "model.pt").backbone, load_file(tmp_path / "model" / "model.safetensors")
    assert again.keys() == own.keys() and all(torch.equal(again[name], tensor) for name, tensor in own.items())


def test_class_rows_of_a_run(trained: Path, tmp_path: Path) -> None:
    convert("consolidate", trained, tmp_path / "model", "--rows")
    assert "24 class centres as 3 files" in convert("reshard", trained, "--out", tmp_path / "rows", "--ranks", "3")
    files = [tmp_path / "rows" / f"rank_{rank}_softmax_weight.pt" for rank in range(3)]
    merged = merge_rows([read_weights(file).rows for file in files], num_classes=24)
    assert torch.equal(merged, load_file(tmp_path / "model" / "class_rows.safetensors")["weight"])
    convert("reshard", *files, "--out", tmp_path / "one")
    assert torch.equal(read_weights(tmp_path / "one" / "rank_0_softmax_weight.pt").rows, merged)
    assert "`reshard`" in convert("import", files[0], tmp_path / "x", code=2)


def test_thresholds_end_in_the_model_card(trained: Path, tiny_faces: Path, tmp_path: Path) -> None:
    people = f"people:calibration:{tiny_faces / 'train'}"
    found = evaluate(trained, tmp_path / "out", "--benchmark", people)["people"]["thresholds"]["1e-03"]
    row = f"| people | 1e-03 | {found['threshold']:.4f} | {found['low']:.4f} to {found['high']:.4f} |"
    convert("consolidate", trained, tmp_path / "model")
    assert row in (tmp_path / "model" / "README.md").read_text()
    # through the exported folder into insightface's package, with the licence of the data
    convert("export", tmp_path / "model", tmp_path / "pack", "--to", "insightface")
    assert row in (tmp_path / "pack" / "README.md").read_text()
    assert "generated" in (tmp_path / "pack" / "MODEL.LICENSE").read_text()
    evaluate(tmp_path / "model", tmp_path / "out", "--benchmark", f"again:calibration:{tiny_faces / 'train'}")
    assert row.replace("people", "again") in (tmp_path / "model" / "README.md").read_text()
    # thresholds and figures of other weights do not travel
    other = trained / "checkpoints" / "step_000000009"
    assert "other weights" in convert("consolidate", other, tmp_path / "other")
    card = (tmp_path / "other" / "README.md").read_text()
    assert row not in card and "none measured with these weights" in card


def test_check_fails_for_clients_that_live_or_are_named(trained: Path, tiny_faces: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    convert("export", trained, file)
    assert "opset 18" in convert("check", file)
    convert("check", file, "--client", "MFR-Ongoing", code=1)
    convert("export", trained, file, "--opset", "14")
    convert("check", file, "--client", "MFR-Ongoing", "--client", "lvface")
    assert "known: insightface" in convert("check", file, "--client", "nobody", code=2)
    report = convert("export", trained, file, "--precision", "int8", "--benchmark", tiny_faces / "heldout.bin")
    assert "int8 against torch" in report and re.search(r"% by torch, [\d.]+% by the int8 file", report)


def test_two_processes_give_the_figures_of_one(trained: Path, tiny_faces: Path, tmp_path: Path) -> None:
    """Every protocol that reads a dataset or a .bin, MegaFace with our own datasets as probes and distractors. To the bit, threads being as many."""
    heldout, train = tiny_faces / "heldout", tiny_faces / "train"
    arguments = ["--benchmark", f"pairs:{heldout}.bin", "--benchmark", f"all:{heldout}"]
    arguments += ["--benchmark", f"groups:clustering:{heldout}", "--benchmark", f"mega:megaface:{heldout},{train}"]
    one = evaluate(trained, tmp_path / "one", *arguments)
    # as the README says; torchrun finds a free port itself (with --master_port 0 it would hand port 0 to its processes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--local_addr", "127.0.0.1"]
    done = subprocess.run(
        [*torchrun, "tools/evaluate.py", str(trained), "--cpu", *arguments, "-o", str(tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["benchmarks"] == one
    assert set(one["mega"]["identification"]) == {"rank_1", "rank_10"}
