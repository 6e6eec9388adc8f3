"""Embeddings of imported weights against the code that wrote them: each project's own model, with random weights saved as that project saves them.

Their code is not ours to ship. Clone what you want compared into one folder and name it: `LVTRAIN_PEERS=folder pytest tests/test_weights_peers.py -s`
(CVLface and AdaFace of mk-minchul, LAFS_CVPR2024 and Part_fViT of szlbiubiubiu, dino of facebookresearch, insightface of deepinsight; it also needs
einops). Figures: tools/results/evaluation.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lvtrain.backbones import create_backbone
from lvtrain.weights import load_model
from lvtrain.weights.architecture import Architecture, fit, recognise
from lvtrain.weights.reading import read_weights
from tests.conftest import ROOT

PEERS = Path(os.environ.get("LVTRAIN_PEERS", "")).resolve()
IMAGES = torch.rand(4, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


@contextlib.contextmanager
def code_of(project: str, inside: str = "", package: str = "") -> Iterator[Callable[[str], Any]]:
    """An importer for modules of a checkout; with `package`, of the folder `inside` as a package whose `__init__` is not run.

    What the checkout imports besides and never calls (a debugger, a FLOP counter, a config library) is replaced by empty modules.
    """
    folder = PEERS / project
    if not os.environ.get("LVTRAIN_PEERS") or not folder.is_dir():
        pytest.skip(f"needs {project}'s own code: clone it below a folder and name the folder in LVTRAIN_PEERS")
    pytest.importorskip("einops")
    before = set(sys.modules)
    stand_ins = {
        "IPython": ["embed"],
        "fvcore": [],
        "fvcore.nn": ["flop_count"],
        "omegaconf": ["DictConfig", "OmegaConf"],
    }
    for name, attributes in stand_ins.items():
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            for attribute in attributes:
                setattr(sys.modules[name], attribute, type(attribute, (), {}))
    path = str(folder if package else folder / inside)
    sys.path.insert(0, path)
    if package:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder / inside)]
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(path)
        for name in set(sys.modules) - before:  # the next project has a `utils` too
            if (
                (getattr(sys.modules[name], "__file__", None) or "").startswith(str(PEERS))
                or name in stand_ins
                or name == package
            ):
                del sys.modules[name]


def settled(model: torch.nn.Module, images: torch.Tensor = IMAGES) -> torch.nn.Module:
    """Random weights, with BatchNorm statistics that go with them: otherwise a deep network's values explode and hide or invent differences."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        if norm.affine:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, 0, 0.1)
    if norms:
        model.train()
        with torch.no_grad():
            for seed in range(2):
                model(images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def assert_equal(name: str, file: Path, expected: torch.Tensor, *options: str, images: torch.Tensor = IMAGES) -> None:
    """Imports `file` from the command line and compares embeddings, relative to the largest value where that is above 1."""
    out = file.parent / "imported"
    command = [sys.executable, "tools/convert_checkpoint.py", "import", str(file), str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    model = load_model(out)
    got = model.forward(images)
    assert got.shape == expected.shape
    scale = float(expected.abs().max())
    difference = float((got - expected).abs().max())
    print(f"\n{name}: {model.name.split()[0]}, largest difference {difference:.1e}, embeddings up to {scale:.2f}")
    assert (expected - expected[:1]).abs().max() > 1e-2 * scale, "the images must tell"
    assert difference <= 1e-5 * max(1.0, scale)


def seeded() -> None:
    torch.manual_seed(0)


CVL = "cvlface/research/recognition/code/run_v1/models"


@pytest.mark.parametrize(
    ("kind", "name", "colours"),
    [
        ("vit", "small", "RGB"),
        ("vit", "base", "BGR"),
        ("iresnet", "ir18", "BGR"),
        ("iresnet", "ir50", "RGB"),
        ("iresnet", "ir101", "BGR"),
    ],
)
def test_cvlface(kind: str, name: str, colours: str, tmp_path: Path) -> None:
    seeded()
    with code_of("CVLface", CVL, "cvlface_models") as load:
        config = types.SimpleNamespace(name=name, output_dim=512, mask_ratio=0.0, color_space=colours)
        model = settled(load(f"cvlface_models.{kind}").load_model(config))
    with torch.no_grad():
        expected = model(IMAGES)  # takes RGB, and converts it if its weights take BGR
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.yaml").write_text(f"name: {name}\ncolor_space: {colours}\n")
    assert_equal(f"CVLface {kind} {name} {colours}", tmp_path / "model.pt", expected)


@pytest.mark.parametrize("name", ["ir_18", "ir_34", "ir_50", "ir_101"])
def test_adaface(name: str, tmp_path: Path) -> None:
    seeded()
    with code_of("AdaFace") as load:
        model = settled(load("net").build_model(name))
    with torch.no_grad():
        direction, norm = model(IMAGES.flip(1))  # it takes BGR
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    head = {"head.kernel": torch.randn(512, 10), "head.t": torch.ones(1)}
    arguments = {"hyper_parameters": argparse.Namespace(arch=name), "callbacks": {}}
    torch.save(
        {"pytorch-lightning_version": "1.4.4", "epoch": 1, "state_dict": {**state, **head}, **arguments},
        tmp_path / "last.ckpt",
    )
    assert_equal(f"AdaFace {name}", tmp_path / "last.ckpt", direction * norm)


LAFS = {
    "loss_type": "None", "GPU_ID": None, "num_class": 10, "num_patches": 196, "image_size": 112, "patch_size": 8, "dim": 768, "depth": 12,
    "heads": 11, "mlp_dim": 2048, "dropout": 0.1, "emb_dropout": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("landmarks", [False, True])
def test_lafs(landmarks: bool, tmp_path: Path) -> None:
    """`train_largescale.py`'s backbone; the fViT as `lafs_train.py` saves it, in a checkpoint of student and teacher."""
    seeded()
    with code_of("LAFS_CVPR2024") as load:
        model = settled(load("face_pre_pro.ViT_face").ViT_face_landmark_patch8(**LAFS, with_land=landmarks))
        with torch.no_grad():
            expected = model(IMAGES)
    state = model.state_dict()
    if landmarks:
        torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "Backbone_checkpoint.pth")
        assert_equal("LAFS Part fViT", tmp_path / "Backbone_checkpoint.pth", expected)
        return
    teacher = {f"backbone.{key}": value for key, value in state.items()} | {"head.mlp.0.weight": torch.randn(8, 768)}
    student = {f"module.{key}": torch.randn_like(value) for key, value in teacher.items()}
    content = {
        "student": student,
        "teacher": teacher,
        "epoch": 3,
        "args": argparse.Namespace(arch="vit"),
        "dino_loss": {},
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    assert_equal("LAFS fViT (teacher)", tmp_path / "checkpoint.pth", expected)


def test_part_fvit(tmp_path: Path) -> None:
    """The BMVC 2022 release; it takes pixels from 0 to 255."""
    seeded()
    with code_of("Part_fViT") as load:
        module = load("vit_pytorch_my.vit_face_withlandmark")
        model = settled(module.ViT_face_landmark_patch8(**LAFS, with_land=True), (IMAGES + 1) * 127.5)
        with torch.no_grad():
            expected = model((IMAGES + 1) * 127.5)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    assert_equal("Part fViT", tmp_path / "checkpoint.pth", expected)


@pytest.mark.parametrize(("name", "patch"), [("vit_tiny", 16), ("vit_small", 8), ("vit_small", 16), ("vit_base", 16)])
def test_dino(name: str, patch: int, tmp_path: Path) -> None:
    seeded()
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    with code_of("dino") as load:
        model = load("vision_transformer").__dict__[name](patch_size=patch).eval()
        with torch.no_grad():
            expected = model(images)
    teacher = {f"backbone.{key}": value for key, value in model.state_dict().items()} | {
        "head.last_layer.weight_g": torch.ones(9, 1)
    }
    student = {f"module.{key}": torch.randn_like(value) for key, value in teacher.items()}
    content = {
        "student": student,
        "teacher": teacher,
        "epoch": 3,
        "args": argparse.Namespace(arch=name),
        "fp16_scaler": {},
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    assert_equal(f"DINO {name}/{patch}", tmp_path / "checkpoint.pth", expected, images=images)


ARCFACE = [
    "vit_t",
    "vit_s",
    "vit_b_dp005_mask_005",
    "vit_l_dp005_mask_005",
    "r18",
    "r34",
    "r50",
    "r100",
    "r200",
    "mbf",
    "mbf_large",
]


@pytest.mark.parametrize("name", ARCFACE)
def test_arcface_torch(name: str, tmp_path: Path) -> None:
    seeded()
    with code_of("insightface", "recognition/arcface_torch") as load:
        model = settled(load("backbones").get_model(name, dropout=0.0, fp16=False, num_features=512))
        with torch.no_grad():
            expected = model(IMAGES)
    checkpoint = {
        "epoch": 1,
        "global_step": 2,
        "state_dict_backbone": model.state_dict(),
        "state_dict_softmax_fc": {"weight": torch.randn(5, 512)},
    }
    torch.save(checkpoint, tmp_path / "checkpoint_gpu_0.pt")
    assert_equal(f"arcface_torch {name}", tmp_path / "checkpoint_gpu_0.pt", expected)


@pytest.mark.parametrize("dynamo", [False, True], ids=["as torch2onnx.py", "dynamo"])
@pytest.mark.parametrize("name", ["r18", "r50", "r100", "mbf", "mbf_large"])
def test_arcface_torch_onnx(name: str, dynamo: bool, tmp_path: Path) -> None:
    """ONNX files of their networks, made as their `torch2onnx.py` makes them and by torch's present exporter."""
    onnx = pytest.importorskip("onnx")
    seeded()
    with code_of("insightface", "recognition/arcface_torch") as load:
        model = settled(load("backbones").get_model(name, dropout=0.0, fp16=False, num_features=512))
        with torch.no_grad():
            expected = model(IMAGES)
        path = str(tmp_path / "model.onnx")
        opset = 18 if dynamo else 11
        torch.onnx.export(model, (IMAGES[:1],), path, input_names=["data"], opset_version=opset, dynamo=dynamo)
    if not dynamo:
        file = onnx.load(path)
        file.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "None"
        onnx.save(file, path)
    assert_equal(f"arcface_torch {name}, ONNX", Path(path), expected)


def test_arcface_torch_vit_h(tmp_path: Path) -> None:
    """3 GB a copy: recognised with two blocks' weights in all 48 places, values compared with two blocks."""
    seeded()
    shape = {
        "img_size": 112,
        "patch_size": 9,
        "num_classes": 512,
        "embed_dim": 1024,
        "num_heads": 8,
        "norm_layer": "ln",
    }
    with code_of("insightface", "recognition/arcface_torch") as load:
        model = settled(load("backbones.vit").VisionTransformer(depth=2, mask_ratio=0, **shape))
        with torch.no_grad():
            expected = model(IMAGES)
    state = model.state_dict()
    blocks = {
        f"blocks.{i}.{n[9:]}": state[f"blocks.{i % 2}.{n[9:]}"]
        for n in state
        for i in range(48)
        if n[:9] == "blocks.0."
    }
    torch.save(state | blocks, tmp_path / "model.pt")
    weights = read_weights(tmp_path / "model.pt").backbone
    assert recognise(weights) == Architecture("vit_h", 512)
    ours = create_backbone("vit_h", depth=2).eval()
    fit(ours, weights)
    with torch.no_grad():
        got = ours(IMAGES)
    difference, scale = float((got - expected).abs().max()), float(expected.abs().max())
    print(f"\narcface_torch vit_h: largest difference {difference:.1e}, embeddings up to {scale:.2f}")
    assert difference <= 1e-5 * max(1.0, scale)


@pytest.mark.parametrize(("ours", "theirs"), [("mobilefacenet", "mbf"), ("mobilefacenet_large", "mbf_large")])
def test_mobilefacenet_is_arcface_torchs(ours: str, theirs: str) -> None:
    """The same sums, in float64 so that only another formula shows; in training mode as well."""
    seeded()
    with code_of("insightface", "recognition/arcface_torch") as load:
        model = settled(load("backbones").get_model(theirs, fp16=False, num_features=512)).double()
        backbone = create_backbone(ours).double().eval()
        backbone.load_state_dict(model.state_dict(), strict=True)
        for training in (False, True):
            got, expected = (network.train(training)(IMAGES.double()) for network in (backbone, model))
            assert float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
