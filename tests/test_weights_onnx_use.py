"""An ONNX pack where weights are asked for: evaluated, imported, the start of a run, the teacher of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lvtrain.weights import load_model
from lvtrain.weights.architecture import Architecture
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.runs import events, output, recipe_file, run, tool
from tests.test_weights_onnx import OLD, edited, export, network, normalising

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SHAPE: dict[str, Any] = {"blocks": [1, 1, 1, 1], "scale": 1}
BACKBONE: dict[str, Any] = {"name": "mobilefacenet", "embedding_dim": 32, "overrides": SHAPE}
FACES = torch.rand(4, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1


def promise_any_batch(graph: Any) -> None:
    """As arcface_torch's torch2onnx.py does, though the flattening was traced for one image."""
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "None"
    (flatten,) = (node for node in graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    del flatten.attribute[:]
    graph.initializer.append(onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [1, 512]))
    flatten.input.append("shape")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileFaceNet as insightface exports one: BatchNorms folded, one image at a time."""
    backbone = network(Architecture("mobilefacenet", 32, 112, {"blocks": (1, 1, 1, 1), "scale": 1}))
    traced = export(backbone, tmp_path_factory.mktemp("pack") / "traced.onnx", images=FACES[:1], **OLD)
    return edited(traced, traced.with_name("w600k_mbf.onnx"), promise_any_batch)


def start(folder: Path, faces: Path, **changes: Any) -> Path:
    phases = [{"name": "only", "global_batch": 16, "micro_batches": 2}]
    recipe = {"phases": phases, "schedule": {"total": "2 steps"}, "backbone": BACKBONE, **changes}
    return recipe_file(folder, faces / "train", **recipe)


def test_evaluated_and_imported_it_gives_the_same_figures(pack: Path, tiny_faces: Path, tmp_path: Path) -> None:
    pixels = edited(pack, tmp_path / "pixels.onnx", normalising(127.5, 128.0, epsilon=None))
    for source in (pack, pixels):
        done = tool("convert_checkpoint", "import", source, tmp_path / source.stem)
        assert done.exit_code == 0, done.output
        expected = load_model(source).forward(FACES)
        got = load_model(tmp_path / source.stem).forward(FACES)
        assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    accuracies = []
    for model in (pack, tmp_path / pack.stem):
        benchmark = f"heldout:{tiny_faces / 'heldout.bin'}"
        done = tool("evaluate", model, "--cpu", "--benchmark", benchmark, "-o", tmp_path / "out")
        assert done.exit_code == 0, done.output
        found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        accuracies.append(found["benchmarks"]["heldout"]["accuracy"])
    assert accuracies[0] == accuracies[1] > 0.55


def _without_statistics(rank: int, ranks: int, recipe: str) -> int:
    from lvtrain import main
    from lvtrain.training import initial

    initial.restore_norms = lambda *arguments, **options: 0  # type: ignore[assignment]
    return main.main(["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / "zero2.json")])


def test_a_run_starts_from_it_with_statistics_of_its_own_images(pack: Path, tiny_faces: Path, tmp_path: Path) -> None:
    """At this rate nothing is learned: what changes the network is one step's batch statistics."""

    def least_cosine(folder: Path) -> float:
        got = load_model(folder / "runs" / "tiny").forward(FACES)
        return float(torch.nn.functional.cosine_similarity(got, load_model(pack).forward(FACES)).min())

    recipes = {
        name: start(tmp_path / name, tiny_faces, init_from=str(pack), optimizer={"lr": 1e-9})
        for name in ("with", "without")
    }
    assert run(recipes["with"], ranks=2) == 0, output(recipes["with"])
    (event,) = events(tmp_path / "with" / "runs" / "tiny", "init_from")
    assert event["left_fresh"] == [] and event["norms"].startswith("22 ")
    assert event["input"] == load_model(pack).takes.pixels()
    assert run_ranks(2, _without_statistics, str(recipes["without"])) == [0, 0]
    kept, lost = least_cosine(tmp_path / "with"), least_cosine(tmp_path / "without")
    assert lost < 0.9 < 0.95 < kept, (lost, kept)


def test_a_run_learns_from_it(pack: Path, tiny_faces: Path, tmp_path: Path) -> None:
    method = {"name": "pco", "window": 2, "distill": {"teacher": str(pack), "weight": 0.5}}
    student = {"name": "vit_nano", "embedding_dim": 32, "overrides": {"dim": 32, "depth": 1, "heads": 2}}
    recipe = start(tmp_path, tiny_faces, method=method, backbone=student)
    assert run(recipe) == 0, output(recipe)


def test_another_network_is_named(pack: Path, tiny_faces: Path, tmp_path: Path) -> None:
    recipe = start(tmp_path, tiny_faces, init_from=str(pack), backbone={"name": "iresnet18", "overrides": {}})
    assert run(recipe) == 2
    (line,) = (line for line in output(recipe).splitlines() if line.startswith("lvtrain: error"))
    assert (
        "init_from.path" in line
        and "name: mobilefacenet, embedding_dim: 32, overrides: {'blocks': (1, 1, 1, 1)" in line
    )
