"""What travels with a model: the identifier of its space, its licence class and its provenance; and what is refused by them."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lvtrain.backbones import create_backbone
from lvtrain.data import ShardDataset
from lvtrain.data.index import read_manifest
from lvtrain.evaluation.embeddings import read_embeddings, write_facts
from lvtrain.export.model_card import Card
from lvtrain.export.packages import write_folder
from lvtrain.recipe import files as recipes
from lvtrain.training.run_folder import keep_provenance
from lvtrain.weights import load_model
from lvtrain.weights.architecture import Architecture
from lvtrain.weights.licences import commercial_use, strictest
from lvtrain.weights.provenance import provenance_of
from lvtrain.weights.reading import read_weights
from lvtrain.weights.space import space_of
from tests.runs import output, recipe_file, run, tool

BACKBONE: dict[str, Any] = {"name": "vit_nano", "embedding_dim": 32, "overrides": {}}


def weights(file: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    backbone = create_backbone("vit_nano", embedding_dim=32)
    save_file(backbone.state_dict(), file)
    return file


def convert(*arguments: object, code: int = 0) -> str:
    done = tool("convert_checkpoint", *arguments)
    assert done.exit_code == code, done.output
    return done.output


def metadata(file: Path) -> dict[str, str]:
    onnx = pytest.importorskip("onnx")
    return {entry.key: entry.value for entry in onnx.load(str(file)).metadata_props}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("provenance")


@pytest.fixture(scope="module")
def trained(folder: Path, tiny_faces: Path) -> Path:
    """A run on open data that began from weights whose licence the recipe states, with a teacher of nobody knows what."""
    start = {"path": str(weights(folder / "start.safetensors", 1)), "licence": "CC-BY-4.0"}
    teacher = str(weights(folder / "teacher.safetensors", 2))
    recipe = recipe_file(
        folder,
        tiny_faces / "train",
        backbone=BACKBONE,
        init_from=start,
        method={"name": "pco", "window": 2, "distill": {"teacher": teacher, "weight": 0.5}},
        phases=[{"name": "only", "global_batch": 16, "micro_batches": 2}],
        schedule={"total": "2 steps"},
    )
    assert run(recipe) == 0, output(recipe)
    return folder / "runs" / "tiny"


def test_a_run_that_has_trained_keeps_what_it_began_with(trained: Path, tmp_path: Path, tiny_faces: Path) -> None:
    """Its start is gone, or others' weights lie there now."""
    recipe = recipes.load(trained / "recipe.yaml", ["init_from.path=gone"])
    before = (trained / "provenance.json").read_text()
    keep_provenance(trained, recipe, ShardDataset(tiny_faces / "train"))
    assert (trained / "provenance.json").read_text() == before
    (tmp_path / "environment.json").write_text(json.dumps({"git": None, "packages": {}}))
    keep_provenance(tmp_path, recipe, ShardDataset(tiny_faces / "train"))
    assert [terms.use for terms in provenance_of(tmp_path).licences] == ["yes", "yes", "unknown"]


def sha256_of(state: dict[str, torch.Tensor]) -> str:
    """As the page says: names, shapes and values of the floating-point tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if value.dtype == torch.float32:
            digest.update(f"{name} {tuple(value.shape)} torch.float32 ".encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]


def test_one_space_for_a_run_and_all_that_is_exported_from_it(trained: Path, tmp_path: Path) -> None:
    convert("consolidate", trained, tmp_path / "model")
    convert("export", tmp_path / "model", tmp_path / "model.pt", "--to", "arcface")
    convert("export", trained, tmp_path / "model.onnx")
    convert("export", trained, tmp_path / "old.onnx", "--opset", "14", "--batch", "1")
    space = sha256_of(read_weights(tmp_path / "model.pt").backbone)
    forms = [trained, max((trained / "checkpoints").iterdir())]
    forms += [tmp_path / name for name in ("model", "model.pt", "model.onnx", "old.onnx")]
    assert {form.name: space_of(form) for form in forms} == {form.name: space for form in forms}
    assert metadata(tmp_path / "model.onnx")["lvtrain.space"] == space
    assert space in (tmp_path / "model" / "README.md").read_text()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["lvtrain"]["card"]["space"] == space


def test_other_weights_and_other_precisions_are_other_spaces(trained: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    convert("consolidate", trained, tmp_path / "model")
    space = space_of(trained)
    for precision in ("int8", "float16"):
        convert("export", trained, tmp_path / f"{precision}.onnx", "--precision", precision)
    assert space_of(tmp_path / "int8.onnx").startswith(f"{space}+int8-")
    assert space_of(tmp_path / "float16.onnx").startswith(f"{space}+float16-")
    # what somebody changes in a file or a folder does not keep the identifier
    convert("export", trained, tmp_path / "model.onnx")
    model = onnx.load(str(tmp_path / "model.onnx"))
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    onnx.save(model, str(tmp_path / "edited.onnx"))
    assert metadata(tmp_path / "edited.onnx")["lvtrain.space"] == space != space_of(tmp_path / "edited.onnx")
    weights(tmp_path / "model" / "model.safetensors", 3)
    assert space_of(tmp_path / "model") == space_of(tmp_path / "model" / "model.safetensors") != space


def test_an_onnx_file_says_what_the_run_knew(trained: Path, tiny_faces: Path, tmp_path: Path) -> None:
    convert("export", trained, tmp_path / "model.onnx")
    found = json.loads(metadata(tmp_path / "model.onnx")["lvtrain.provenance"])
    environment = json.loads((trained / "environment.json").read_text())
    assert found["commit"] == (environment["git"] or "")
    assert found["packages"]["torch"] == version("torch")
    assert found["fingerprint"] == read_manifest(tiny_faces / "train").fingerprint
    assert found["recipe"] == hashlib.sha256((trained / "recipe.yaml").read_bytes()).hexdigest()[:16]
    assert [part["licence"] for part in found["licences"]] == [
        "CC0-1.0 (generated, no person depicted)",
        "CC-BY-4.0",
        None,
    ]
    assert metadata(tmp_path / "model.onnx")["lvtrain.commercial"] == "unknown"
    assert provenance_of(tmp_path / "model.onnx") == provenance_of(trained)


def test_an_onnx_file_that_comes_back_is_of_its_space(tmp_path: Path) -> None:
    """Its BatchNorms are folded, so its tensors are others; its embeddings are the same."""
    overrides = {"blocks": (1, 1, 1, 1), "scale": 1}
    backbone = create_backbone("mobilefacenet", embedding_dim=32, **overrides).eval()
    card = Card("test", "mobilefacenet", 32, 1)
    write_folder(tmp_path / "a", Architecture("mobilefacenet", 32, 112, overrides), backbone.state_dict(), card=card)
    convert("export", tmp_path / "a", tmp_path / "a.onnx")
    convert("import", tmp_path / "a.onnx", tmp_path / "b", "--licence", "MIT")
    assert space_of(tmp_path / "b") == space_of(tmp_path / "a") != space_of(tmp_path / "b" / "model.safetensors")
    assert provenance_of(tmp_path / "b").commercial == "yes"


def test_commercial_export_needs_every_licence(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    said = convert("export", trained, out, "--for", "commercial", code=2)
    assert "teacher.safetensors, by method.distill.teacher of run tiny: no licence stated (unknown)" in said
    assert "start.safetensors" not in said and not out.exists()
    file = weights(tmp_path / "w.safetensors", 4)
    expected = {"CC-BY-NC-4.0": 2, "CC0-1.0": 0, "commercial: yes (contract 7)": 0, "by request": 2}
    for number, (licence, code) in enumerate(expected.items()):
        source = tmp_path / f"imported{number}"
        convert("import", file, source, "--licence", licence)
        convert("export", source, tmp_path / f"{number}", "--to", "folder", "--for", "commercial", code=code)
    assert provenance_of(tmp_path / "1").commercial == "yes"  # and the exported folder still says so


def a_run(folder: Path, licence: str | None, **recipe: Any) -> Path:
    """A run folder of version 0.1: it kept the licence of the data only."""
    folder.mkdir(parents=True)
    values = {"data": {"path": "gone/faces"}, "method": {"name": "pco"}, **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "environment.json").write_text(json.dumps({"data_licence": licence, "git": "abc", "packages": {}}))
    return folder


def test_old_runs_are_unknown_where_they_say_nothing(tmp_path: Path) -> None:
    assert provenance_of(a_run(tmp_path / "open", "CC0-1.0")).commercial == "yes"
    assert provenance_of(a_run(tmp_path / "silent", None)).commercial == "unknown"
    begun = a_run(tmp_path / "begun", "CC0-1.0", init_from={"path": "gone.pt"})
    assert [terms.use for terms in provenance_of(begun).licences] == ["yes", "unknown"]
    # what a user states fills what is unknown, and never replaces what is known
    assert provenance_of(begun, stated="MIT").commercial == "yes"
    assert provenance_of(a_run(tmp_path / "no", "research only"), stated="MIT").commercial == "no"
    assert provenance_of(tmp_path / "open", stated="CC-BY-NC-4.0").commercial == "no"


def test_the_strictest_licence_counts() -> None:
    assert [strictest(uses) for uses in (["yes"], ["yes", "unknown"], ["yes", "unknown", "no"], [])] == [
        "yes",
        "unknown",
        "no",
        "unknown",
    ]
    classes = {
        "yes": ("CC0-1.0", "CC-BY-4.0", "CC BY-SA 4.0", "MIT", "Apache-2.0", "commercial: yes (research, too)"),
        "no": ("CC-BY-NC-4.0", "CC BY-NC-SA 4.0", "Non-commercial research", "commercial: no", "for academic use"),
        "unknown": (None, "", "unknown", "by request", "CC-BY-ND-4.0", "MITRE", "GPL-3.0"),
    }
    assert {use: [commercial_use(text) for text in texts] for use, texts in classes.items()} == {
        use: [use] * len(texts) for use, texts in classes.items()
    }


def test_embeddings_of_two_spaces_are_not_compared(
    trained: Path, tiny_faces: Path, folder: Path, tmp_path: Path
) -> None:
    """By the tool that looks for identities of a test set in the training data."""
    data, pairs = tiny_faces / "train", tiny_faces / "heldout.bin"
    generator = np.random.default_rng(0)
    rows = {240: generator.normal(size=(240, 32)), 400: generator.normal(size=(400, 32))}
    spaces = {
        "a": space_of(trained),
        "b": space_of(folder / "teacher.safetensors"),
        "a8": space_of(trained) + "+int8-00ff",
    }
    for name, space in spaces.items():
        for count, array in rows.items():
            np.save(tmp_path / f"{name}{count}.npy", array)
            write_facts(tmp_path / f"{name}{count}.npy", array.shape, space=space, model=name)
    np.save(tmp_path / "bare400.npy", rows[400])
    assert (
        read_embeddings(tmp_path / "a240.npy").space == spaces["a"]
        and read_embeddings(tmp_path / "bare400.npy").space is None
    )

    def clean(theirs: str) -> Any:
        given = ["--embeddings", tmp_path / "a240.npy", "--evaluation", pairs, "--evaluation-embeddings"]
        return tool("clean_dataset", data, tmp_path / "out.json", *given, tmp_path / theirs)

    for other in ("b400.npy", "a8400.npy"):
        done = clean(other)
        assert done.exit_code == 2 and spaces["a"] in done.output and other in done.output
    assert "cannot be compared" not in clean("a400.npy").output + clean("bare400.npy").output


def test_an_evaluation_names_the_space(trained: Path, tiny_faces: Path, tmp_path: Path) -> None:
    done = tool("evaluate", trained, "--cpu", "-b", f"heldout:{tiny_faces / 'heldout.bin'}", "-o", tmp_path)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "evaluation.json").read_text())["space"] == space_of(trained)
    assert load_model(trained).embedding_dim == 32
