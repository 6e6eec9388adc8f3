"""Weights in and out: every wrapper the field uses, there and back to the bit, and the real clients of an exported ONNX."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lvtrain.backbones import create_backbone
from lvtrain.data import ShardDataset
from lvtrain.datasets.subset import write_subset
from lvtrain.errors import UserError
from lvtrain.export import convert
from lvtrain.export.model_card import Card, for_weights, write_card
from lvtrain.export.packages import arcface_ranges, merge_rows, read_deepspeed, split_rows, write_arcface, write_folder
from lvtrain.weights import load_model
from lvtrain.weights.architecture import Architecture, fit, recognise, resize_positions
from lvtrain.weights.foreign import from_ir, swap_colours
from lvtrain.weights.reading import read_weights
from lvtrain.weights.source import open_source
from tests.ranks import run_ranks
from tests.shard_data import make_dataset

SMALL = {"dim": 32, "depth": 2, "heads": 2}


def small_vit(embedding_dim: int = 512) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = create_backbone("vit_nano", embedding_dim=embedding_dim)
    for module in backbone.modules():  # statistics of a trained network, not of a fresh one
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return backbone.eval()


def embed(backbone: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return backbone(images)


# -------------------------------------------------------------------------------------------------------------- reading


def wrapped(state: dict[str, torch.Tensor], how: str) -> Any:
    if how == "flat":
        return state
    if how == "module":
        return {f"module.{name}": value for name, value in state.items()}
    if how == "compiled":
        return {f"_orig_mod.{name}": value for name, value in state.items()}
    if how == "cvlface":
        return {f"net.{name}": value for name, value in state.items()}
    if how == "arcface rank":
        return {
            "epoch": 3,
            "global_step": 7,
            "state_dict_backbone": state,
            "state_dict_softmax_fc": {"weight": torch.ones(5, 512)},
        }
    if how == "lightning":
        return {
            "pytorch-lightning_version": "1.0",
            "state_dict": {f"model.{n}": v for n, v in state.items()} | {"head.kernel": torch.ones(2, 2)},
        }
    teacher = {f"backbone.{name}": value for name, value in state.items()} | {"head.mlp.0.weight": torch.ones(3, 3)}
    return {"student": {f"module.{name}": value + 1 for name, value in teacher.items()}, "teacher": teacher, "epoch": 4}


@pytest.mark.parametrize(
    "how", ["flat", "module", "compiled", "cvlface", "arcface rank", "lightning", "self-supervised"]
)
@pytest.mark.parametrize("name", ["vit_nano", "iresnet18", "fvit_tiny", "part_fvit_tiny"])
def test_every_wrapper_of_every_family_is_recognised(name: str, how: str, tmp_path: Path) -> None:
    overrides = {"depth": 2} if "fvit" in name else {}
    backbone = create_backbone(name, embedding_dim=512)
    state = {k: v for k, v in backbone.state_dict().items()}
    torch.save(wrapped(state, how), tmp_path / "model.pt")
    weights = read_weights(tmp_path / "model.pt")
    assert weights.backbone.keys() == state.keys(), overrides
    assert all(torch.equal(weights.backbone[key], value) for key, value in state.items())
    architecture = recognise(weights.backbone)
    assert (architecture.name, architecture.embedding_dim, architecture.image_size) == (name, 512, 112)
    if how == "arcface rank":
        assert weights.rows is not None and weights.rows.shape == (5, 512)


def test_student_or_teacher(tmp_path: Path) -> None:
    state = create_backbone("fvit_tiny", embedding_dim=256).state_dict()
    torch.save(wrapped(state, "self-supervised"), tmp_path / "checkpoint.pth")
    student = read_weights(tmp_path / "checkpoint.pth", branch="student")
    assert torch.equal(student.backbone["cls_token"], state["cls_token"] + 1)
    with pytest.raises(UserError, match="no 'pupil'"):
        read_weights(tmp_path / "checkpoint.pth", branch="pupil")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch lvtrain_was_here",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for file in ("evil.pt", "evil.pkl"):
        with pytest.raises(UserError, match=file):
            read_weights(tmp_path / file)
    assert not (tmp_path / "lvtrain_was_here").exists()


def test_what_lies_beside_the_weights_is_not_built(tmp_path: Path) -> None:
    """DINO and LAFS save their argparse.Namespace, others numpy scalars: torch's plain reader refuses the whole file for them."""
    state = create_backbone("fvit_tiny", embedding_dim=256).state_dict()
    content = {"teacher": state, "args": argparse.Namespace(arch="vit"), "best": np.float64(0.5), "where": Path("x")}
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert read_weights(tmp_path / "checkpoint.pth").backbone.keys() == state.keys()


def test_foreign_files_are_told_apart(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="backbone"):
        recognise(read_weights(tmp_path / "other.pt").backbone)
    (tmp_path / "cut.safetensors").write_bytes(b"123456789")
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        read_weights(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"nowhere\.pt"):
        read_weights(tmp_path / "nowhere.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt"):
        read_weights(tmp_path / "list.pt")
    for names in (("layer1.0.bn1.weight", "fc.weight"), ("patch_embed.proj.weight", "feature.0.weight")):
        with pytest.raises(UserError, match="backbone"):
            recognise({name: torch.ones(3, 4) for name in names})
    write_folder(tmp_path / "folder", Architecture("vit_nano", 64), {}, card=Card("test", "vit_nano", 64, 1))
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"123456789")
    with pytest.raises(UserError, match="folder"):
        load_model(tmp_path / "folder")
    with pytest.raises(UserError, match="has no moving average"):
        load_model(tmp_path / "other.pt", average=True)


def test_a_diverged_model_is_not_exported(tmp_path: Path) -> None:
    state = create_backbone("vit_nano", embedding_dim=64).state_dict()
    state["norm.weight"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    out = tmp_path / "out"
    for conversion in (convert.import_weights, convert.consolidate, convert.export):
        with pytest.raises(UserError, match=r"norm.weight holds NaN"):
            conversion(tmp_path / "nan.pt", out)
    assert not out.exists()


def test_positions_are_resized_and_the_class_token_kept() -> None:
    positions = torch.randn(1, 1 + 14 * 14, 8)
    resized = resize_positions(positions, 1 + 12 * 12)
    assert resized.shape == (1, 145, 8) and torch.equal(resized[:, 0], positions[:, 0])
    assert torch.allclose(resize_positions(positions, 1 + 14 * 14), positions, atol=1e-5)
    flat = torch.full((1, 16, 4), 3.0)
    assert torch.allclose(resize_positions(flat, 25), torch.full((1, 25, 4), 3.0), atol=1e-5)


def test_heads_are_never_guessed() -> None:
    state = create_backbone("vit_nano", dim=48, heads=3).state_dict()
    with pytest.raises(UserError, match="import --heads N"):
        recognise(state)
    backbone = recognise(state, heads=3).create().eval()
    fit(backbone, state)
    original = create_backbone("vit_nano", dim=48, heads=3).eval()
    original.load_state_dict(state)
    images = torch.randn(2, 3, 112, 112)
    assert torch.equal(embed(backbone, images), embed(original, images))


def test_shapes_that_cannot_fit_are_named() -> None:
    state = create_backbone("vit_nano", embedding_dim=64).state_dict()
    with pytest.raises(UserError, match=r"feature.2.weight .*\(64, 128\)"):
        fit(create_backbone("vit_nano", embedding_dim=32), state)
    del state["norm.weight"]
    with pytest.raises(UserError, match=r"norm\.weight"):
        fit(create_backbone("vit_nano", embedding_dim=64), state)


# ------------------------------------------------------------------------------------------------------ there and back


def test_folder_and_arcface_there_and_back_are_the_identity(tmp_path: Path) -> None:
    backbone = small_vit()
    state = backbone.state_dict()
    architecture = Architecture("vit_nano", 512)
    images = torch.randn(3, 3, 112, 112)
    card = Card("test", "vit_nano", 512, 1)
    write_folder(tmp_path / "folder", architecture, state, card=card, rows=torch.randn(7, 512))
    write_arcface(tmp_path / "model.pt", state)
    for path in (tmp_path / "folder", tmp_path / "model.pt"):
        model = load_model(path)
        assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in state.items())
        assert torch.equal(model.forward(images), embed(backbone, images))
    tokens, embeddings = load_model(tmp_path / "folder").tokens(
        images
    )  # the three lines of the model card, and what a language model takes
    assert tokens.shape == (3, 49, 128) and torch.allclose(embeddings, embed(backbone, images), atol=1e-5)
    assert "find out before you use" in (tmp_path / "folder" / "README.md").read_text()


@pytest.mark.parametrize("name", ["vit_nano", "iresnet18", "fvit_tiny", "part_fvit_tiny", "dino_vit_tiny"])
def test_every_family_goes_there_and_back_to_the_bit(name: str, tmp_path: Path) -> None:
    """Ours -> arcface_torch's layout -> ours -> our folder -> ours, each step from a file."""
    architecture = Architecture(name, 192 if name == "dino_vit_tiny" else 512)
    state = architecture.create().state_dict()
    write_arcface(tmp_path / "model.pt", state)
    assert torch.load(tmp_path / "model.pt", weights_only=True).keys() == state.keys()
    read = read_weights(tmp_path / "model.pt").backbone
    found = recognise(read)
    assert (found.name, found.embedding_dim, found.image_size) == (name, architecture.embedding_dim, 112)
    write_folder(tmp_path / "folder", found, read, card=Card("test", name, 512, 1))
    source = open_source(tmp_path / "folder")
    again = source.state()
    assert source.architecture() == found and again.keys() == state.keys()
    assert all(torch.equal(again[key], value) and again[key].dtype == value.dtype for key, value in state.items())


def test_adafaces_names_and_colours_there_and_back(tmp_path: Path) -> None:
    """Its layout written by hand here: body numbered through, the last BatchNorm without weight and bias. Tests against its code: test_weights_peers."""
    ours = create_backbone("iresnet18", first_shortcut="subsample").state_dict()
    renamed = {"conv1": "input_layer.0", "bn1": "input_layer.1", "prelu": "input_layer.2"}
    renamed |= {"bn2": "output_layer.0", "fc": "output_layer.3", "features": "output_layer.4"}
    inner = {"bn1": 0, "conv1": 1, "bn2": 2, "prelu": 3, "conv2": 4, "bn3": 5}
    for layer, block in ((layer, block) for layer in range(4) for block in range(2)):
        place, theirs = f"layer{layer + 1}.{block}", f"body.{2 * layer + block}"
        renamed |= {f"{place}.{module}": f"{theirs}.res_layer.{i}" for module, i in inner.items()}
        renamed |= {f"{place}.downsample.{i}": f"{theirs}.shortcut_layer.{i}" for i in (0, 1)}
    assert "layer1.0.downsample.0.weight" not in ours
    theirs = {f"{renamed[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in ours.items()}
    del theirs["output_layer.4.weight"], theirs["output_layer.4.bias"]
    torch.save(
        {"pytorch-lightning_version": "1.4", "state_dict": {f"model.{k}": v for k, v in theirs.items()}},
        tmp_path / "a.ckpt",
    )
    weights = read_weights(tmp_path / "a.ckpt")
    assert weights.bgr and weights.kind.startswith("AdaFace")
    assert weights.backbone.keys() == ours.keys() and all(torch.equal(weights.backbone[k], v) for k, v in ours.items())
    assert recognise(weights.backbone).overrides == {"first_shortcut": "subsample"}
    backbone = create_backbone("iresnet18", first_shortcut="subsample").eval()
    backbone.load_state_dict(ours)
    images = torch.randn(2, 3, 112, 112)
    expected, opened = (
        embed(backbone, images.flip(1)),
        load_model(tmp_path / "a.ckpt"),
    )  # opened as it is, not imported first
    assert (
        torch.allclose(opened.forward(images), expected, atol=1e-5 * float(expected.abs().max()))
        and "BGR" in opened.weights
    )
    with pytest.raises(UserError, match="IR-SE"):
        from_ir({**theirs, "body.0.res_layer.se_block.fc1.weight": torch.ones(1)})


@pytest.mark.parametrize("name", ["vit_nano", "iresnet18", "fvit_tiny", "part_fvit_tiny", "dino_vit_tiny"])
def test_swapped_colours(name: str) -> None:
    backbone = create_backbone(name).eval()
    state = backbone.state_dict()
    swapped = swap_colours(state)
    assert all(torch.equal(swap_colours(swapped)[key], value) for key, value in state.items())
    images = torch.randn(2, 3, 112, 112)
    expected = embed(backbone, images.flip(1))
    backbone.load_state_dict(swapped)
    scale = expected.abs().max()  # a fresh IResNet's values are large
    assert (embed(backbone, images) - expected).abs().max() < 1e-4 * scale
    assert (embed(backbone, images.flip(1)) - expected).abs().max() > 1e-2 * scale


@pytest.mark.parametrize(("classes", "ranks"), [(11, 1), (11, 4), (8, 4), (3, 4), (10007, 8)])
def test_class_rows_for_any_number_of_ranks(classes: int, ranks: int) -> None:
    rows = torch.randn(classes, 6)
    parts = split_rows(rows, ranks)
    assert sum(stop - start for start, stop in arcface_ranges(classes, ranks)) == classes
    assert torch.equal(merge_rows(parts, num_classes=classes), rows)


def test_missing_and_misordered_ranks_are_refused() -> None:
    parts = split_rows(torch.randn(11, 6), 4)
    with pytest.raises(UserError, match=r"9 .* 11"):
        merge_rows(parts[:3], num_classes=11)
    with pytest.raises(UserError, match="order"):
        merge_rows(parts[::-1])


def _save_with_deepspeed(rank: int, size: int, folder: str, stage: int) -> dict[str, torch.Tensor]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    torch.manual_seed(0)
    module = create_backbone("vit_nano", embedding_dim=32, dim=32, depth=1, heads=2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6},
        "zero_allow_untested_optimizer": True,
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine(torch.randn(2, 3, 112, 112)).square().mean())
    engine.step()
    engine.save_checkpoint(folder, tag="s1")
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_folder_consolidates_to_what_its_own_script_gives(stage: int, tmp_path: Path) -> None:
    weights = run_ranks(2, _save_with_deepspeed, str(tmp_path), stage)[0]
    script = [sys.executable, "zero_to_fp32.py", ".", "own"]  # DeepSpeed puts it into the folder
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    own = torch.load(tmp_path / "own" / "pytorch_model.bin", weights_only=True)
    state = read_deepspeed(tmp_path)
    assert state.keys() >= own.keys() | weights.keys()  # the script forgets what ZeRO-1 did not train
    assert all(torch.equal(state[name], value.float()) for name, value in own.items())
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    with pytest.raises(UserError, match="latest"):
        read_deepspeed(tmp_path / "s1")


def test_a_disk_that_is_full_is_one_line_and_leaves_no_stump(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"model\.pt"):
            write_arcface(tmp_path / "model.pt", {"weight": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_a_card_names_the_licence_of_a_subset_and_of_data_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path / "faces", samples=10, size=(16, 16))
    said = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**said, "licence": "by request"}))
    write_subset(tmp_path / "few.json", ShardDataset(data), np.arange(5))
    run = tmp_path / "runs" / "few"
    (run / "checkpoints" / "step_000000004").mkdir(parents=True)
    recipe = {"data": {"path": str(tmp_path / "few.json")}, "method": {"name": "pco"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def card(source: Path) -> Card:
        return for_weights(source, Architecture("vit_nano", 512, 112, {}), {}, "step 4, phase a")

    assert [card(source).data_licence for source in (run, run / "checkpoints" / "step_000000004")] == ["by request"] * 2
    (data / "dataset.json").unlink()
    assert card(run).data_licence is None
    (run / "environment.json").write_text(json.dumps({"data_licence": "as noted at the start"}))
    assert card(run).data_licence == "as noted at the start"
    # other weights that lie in a run are not that run's
    monkeypatch.chdir(run)
    assert card(Path("model.pt")).recipe == card(run / "export" / "model.pt").recipe == ""
    assert card(Path(".")).name == "few"


def test_a_card_names_the_weights_these_were_made_from(tmp_path: Path) -> None:
    recipe = {
        "data": {"path": "gone"},
        "method": {"name": "pco", "distill": {"teacher": "runs/large"}},
        "init_from": {"path": "runs/first"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = for_weights(tmp_path, Architecture("vit_nano", 512, 112, {}), {}, "step 4, phase a")
    write_card(tmp_path / "README.md", card)
    said = (tmp_path / "README.md").read_text()
    for part in ("begun from runs/first", "distilled from runs/large"):
        assert f"- {part}: these weights inherit the conditions of its data, too" in said
