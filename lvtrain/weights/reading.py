"""Reads weight files of other projects: a flat state dict without wrappers' prefixes. Nothing is unpickled that could run code.

Accepted: arcface_torch `model.pt` and `checkpoint_gpu_{rank}.pt`, its older `softmax_fc_gpu_{rank}.pt` and
`rank_{r}_softmax_weight.pt`, LVFace's released `.pt`, CVLface's `model.pt` and AdaFace's Lightning `.ckpt`, LAFS's and
DINO's `checkpoint*.pth`, safetensors files and folders, ONNX files of insightface's networks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json
from lvtrain.weights.foreign import from_ir, is_ir
from lvtrain.weights.onnx.match import read_onnx

_OUTER = ("teacher", "state_dict_backbone", "state_dict", "model_state_dict", "backbone", "model", "student")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PREFIXES = ("module.", "backbone.", "net.", "feat_net.", "encoder.", "model.")


@dataclass
class Weights:
    """A backbone's tensors by bare name, and what came with them.

    `kind` names the format, for messages. `rows` are class centres `[C or part of it, d]`, if the file holds them. `dropped`
    names tensors that belong to neither (a projection head, optimizer state). `bgr`: the file says that it takes blue first.
    `input`: colour order and range of the images that an ONNX file takes.
    """

    kind: str
    backbone: dict[str, torch.Tensor]
    rows: torch.Tensor | None = None
    dropped: list[str] = field(default_factory=list)
    bgr: bool = False
    input: str = ""


def read_weights(path: str | Path, *, branch: str | None = None, average: bool = False, takes: str = "") -> Weights:
    """Reads any of the formats above.

    Args:
        path: file or folder.
        branch: `teacher` or `student` of a self-supervised checkpoint; the teacher when absent.
        average: the moving average that lies beside the weights, as `state_dict_ema` for example.
        takes: how an ONNX file takes its images, where it does not say so itself; other weights are left as they are.

    Raises:
        UserError: no such file, no moving average, a pickle with more than tensors and plain values, or no backbone and no
            class centres in it.
    """
    path = Path(path)
    if path.suffix == ".onnx" and path.is_file():
        found = read_onnx(path, takes)
        return Weights(str(found), found.state, input=found.input)
    content = _load(path)
    if isinstance(content, torch.Tensor):
        return Weights("class rows of one rank (arcface_torch, older)", {}, rows=content.float())
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    if _is_partial_fc(content):
        return Weights("class centres of one rank (arcface_torch's PartialFC)", {}, rows=content["weight"].float())
    rows = None
    softmax = content.get("state_dict_softmax_fc")
    if isinstance(softmax, Mapping) and "weight" in softmax:
        rows = softmax["weight"].float()
    kind, state = _average(content, path) if average else _inner(content, branch)
    bare, dropped = _strip(state)
    if not bare and rows is None:
        raise UserError(
            f"{path} holds no backbone and no class centres (its keys start {', '.join(list(map(str, content))[:5])})"
        )
    kind = _name_kind(content, kind, bare)
    if not average and (beside := [name for name in _AVERAGES if isinstance(content.get(name), Mapping)]):
        kind += f", without its moving average ({beside[0]}; --average takes it)"
    if is_ir(bare):
        bare = from_ir(bare)
    return Weights(kind, bare, rows, dropped, kind.startswith("AdaFace") or _says_bgr(path))


def _is_partial_fc(content: Mapping[str, Any]) -> bool:
    """arcface_torch's `softmax_fc_gpu_{rank}.pt`: a PartialFC's `weight` [c, d], maybe with its optimizer's tensors."""
    weight = content.get("weight")
    alone = all(str(name) == "weight" or str(name).startswith("weight_") for name in content)
    return alone and isinstance(weight, torch.Tensor) and weight.ndim == 2


def strip_wrappers(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Bare tensor names of a flat state dict."""
    return _strip(state)[0]


def _load(path: Path) -> Any:
    if path.is_dir():
        merged: dict[str, torch.Tensor] = {}
        for file in _files(path):
            part = _load(file)
            if twice := merged.keys() & part.keys():
                raise UserError(f"{path}: {min(twice)} is in several files; give one file")
            merged |= part
        return merged
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give a run, a checkpoint, an exported folder or a weights file that does"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with _inert(path):
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}): damaged, not torch's, or with other objects in it; "
            "if you trust it, save its state_dict with torch.save"
        ) from error


def _files(folder: Path) -> list[Path]:
    """The safetensors files that make up one model: those of its index, `model.safetensors`, or the only one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return [folder / name for name in sorted(set(parse_json(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({type(error).__name__}: {error}); copy it again") from error
    files = sorted(folder.glob("*.safetensors"))
    if (one := folder / "model.safetensors") in files:
        return [one]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{folder} has no model.safetensors and not exactly one *.safetensors ({names}); name the file")
    return files


class _Nothing:
    """Replaces an object in the file that is not needed: it takes anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# objects in checkpoints of the field: DINO's and LAFS's arguments, Lightning's callbacks and hyperparameters, configurations, numpy scalars
_BYSTANDERS = (
    "argparse",
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "omegaconf",
    "easydict",
    "pathlib",
    "numpy",
)


def _inert(path: Path) -> AbstractContextManager[Any]:
    """Inside it, known objects that are not tensors are read as `_Nothing`. Their code is neither imported nor run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file: torch.load says what it is
        names = []
    return torch.serialization.safe_globals([(_Nothing, name) for name in names if name.split(".")[0] in _BYSTANDERS])


def _says_bgr(path: Path) -> bool:
    """Whether CVLface's `model.yaml`, next to `model.pt`, says that the weights take BGR."""
    beside = path.with_suffix(".yaml")
    return beside.is_file() and re.search(r"^color_space: *['\"]?BGR", beside.read_text(), re.MULTILINE) is not None


def _average(content: Mapping[str, Any], path: Path) -> tuple[str, Mapping[str, torch.Tensor]]:
    for name in _AVERAGES:
        if isinstance(content.get(name), Mapping):
            return name, content[name]
    raise UserError(f"{path} has no moving average ({', '.join(_AVERAGES)})")


def _inner(content: Mapping[str, Any], branch: str | None) -> tuple[str, Mapping[str, torch.Tensor]]:
    if branch is not None:
        if not isinstance(content.get(branch), Mapping):
            raise UserError(f"the checkpoint has no {branch!r}; it has {', '.join(map(str, content))}")
        return branch, content[branch]
    for name in _OUTER:
        if isinstance(content.get(name), Mapping):
            return name, content[name]
    return "", content


def _strip(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Bare names: a wrapper's prefix is removed if every backbone tensor has it. Heads of self-supervision are left out."""
    tensors = {_bare(str(name)): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    tensors.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel
    dropped = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    changed = True
    while changed and tensors:
        changed = False
        heads = [name for name in tensors if name.startswith(("head.", "dino_head.", "ibot_head.", "loss."))]
        if heads and len(heads) < len(tensors):
            dropped += heads
            tensors = {name: value for name, value in tensors.items() if name not in set(heads)}
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
                changed = True
        with_backbone = [name for name in tensors if name.startswith("backbone.")]
        if with_backbone and len(with_backbone) < len(tensors):
            dropped += [name for name in tensors if not name.startswith("backbone.")]
            tensors = {name.removeprefix("backbone."): tensors[name] for name in with_backbone}
            changed = True
    return {name: _plain(value) for name, value in tensors.items()}, dropped


def _bare(name: str) -> str:
    """A name without the parts that FSDP, activation checkpointing and torch.compile insert."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value.detach().float().contiguous() if value.is_floating_point() else value.detach().contiguous()


def _name_kind(content: Any, outer: str, state: Mapping[str, torch.Tensor]) -> str:
    if "state_dict_softmax_fc" in content or "state_dict_backbone" in content:
        return "arcface_torch checkpoint of one rank"
    if outer in ("teacher", "student"):
        return f"{outer} of a self-supervised checkpoint (DINO or LAFS)"
    if "pytorch-lightning_version" in content:
        return "AdaFace's Lightning checkpoint" if is_ir(state) else "Lightning checkpoint"
    if is_ir(state):
        return "CVLface's or AdaFace's IResNet"
    if "pos_embedding" in state:
        return "LAFS / Part fViT state dict"
    return "flat state dict (arcface_torch, LVFace, CVLface)"
