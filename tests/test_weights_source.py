"""One reader of weights: other trainers' wrappers, folders of several files, moving averages, class centres."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from lvtrain.backbones import create_backbone
from lvtrain.errors import UserError
from lvtrain.weights.source import open_source

SMALL: dict[str, Any] = {"dim": 32, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    torch.manual_seed(3)
    return create_backbone("iresnet18", embedding_dim=16)


def same(path: Path, backbone: torch.nn.Module, **options: Any) -> bool:
    source = open_source(path, **options)
    state, own = source.state(), backbone.state_dict()
    assert source.architecture().name == "iresnet18" and source.architecture().embedding_dim == 16
    assert source.shapes == {name: tensor.shape for name, tensor in state.items()}
    return state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own)


WRAPPERS = {
    "plain": lambda m: m.state_dict(),
    "ddp": lambda m: {f"module.{k}": v for k, v in m.state_dict().items()},
    "fsdp": lambda m: {
        f"_fsdp_wrapped_module.{k.replace('layer1.', 'layer1._fsdp_wrapped_module.')}": v
        for k, v in m.state_dict().items()
    },
    "compiled": lambda m: {f"_orig_mod.{k}": v for k, v in m.state_dict().items()},
    "checkpointed": lambda m: {
        k.replace("layer2.", "layer2._checkpoint_wrapped_module."): v for k, v in m.state_dict().items()
    },
    "averaged": lambda m: AveragedModel(m).state_dict(),
    "facex_zoo": lambda m: {"state_dict": {f"feat_net.{k}": v for k, v in m.state_dict().items()}},
    "model_state_dict": lambda m: {"model_state_dict": m.state_dict(), "epoch": 3},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_of_other_trainers(wrapper: str, backbone: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(WRAPPERS[wrapper](backbone), tmp_path / "model.pt")
    assert same(tmp_path / "model.pt", backbone)


def test_a_moving_average_is_taken_when_asked_for_and_named_otherwise(
    backbone: torch.nn.Module, tmp_path: Path
) -> None:
    other = {name: value + 1 for name, value in backbone.state_dict().items()}
    torch.save({"state_dict": other, "state_dict_ema": backbone.state_dict()}, tmp_path / "model.pth")
    assert same(tmp_path / "model.pth", backbone, average=True)
    assert not same(tmp_path / "model.pth", backbone)
    assert "state_dict_ema" in open_source(tmp_path / "model.pth").kind
    torch.save(other, tmp_path / "alone.pth")
    with pytest.raises(UserError, match="moving average"):
        open_source(tmp_path / "alone.pth", average=True)


def test_a_folder_of_several_files_is_never_merged_silently(backbone: torch.nn.Module, tmp_path: Path) -> None:
    state = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in state.items()}, tmp_path / "optimizer.safetensors")
    assert same(tmp_path, backbone)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"optimizer\.safetensors, weights\.safetensors"):
        open_source(tmp_path)

    names = list(state)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(tmp_path, backbone)


def test_class_centres_come_with_their_shape(backbone: torch.nn.Module, tmp_path: Path) -> None:
    rows = torch.arange(7 * 16, dtype=torch.float32).reshape(7, 16)
    content = {"state_dict_backbone": backbone.state_dict(), "state_dict_softmax_fc": {"weight": rows}}
    torch.save(content, tmp_path / "checkpoint_gpu_0.pt")
    source = open_source(tmp_path / "checkpoint_gpu_0.pt")
    assert source.centres_shape == (7, 16) and torch.equal(source.class_centres(2, 5), rows[2:5])
    torch.save(backbone.state_dict(), tmp_path / "model.pt")
    assert open_source(tmp_path / "model.pt").centres_shape is None


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"\x80\x04."])
def test_what_is_not_weights_is_one_line(content: bytes, tmp_path: Path) -> None:
    for name in ("model.pt", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as refused:
            open_source(tmp_path / name)
        assert name in str(refused.value) and "\n" not in str(refused.value)
