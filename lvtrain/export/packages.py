"""Writes weights: our folder (safetensors, config, model card), arcface_torch's `.pt`, insightface's V2 package, class centres of any rank count."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lvtrain.errors import UserError
from lvtrain.export.model_card import Card, write_card
from lvtrain.files.atomic import write_json, write_text
from lvtrain.weights.architecture import Architecture
from lvtrain.weights.source import CONFIG, ROWS, WEIGHTS
from lvtrain.weights.space import space_of_state


def write_folder(
    folder: str | Path,
    architecture: Architecture,
    state: Mapping[str, torch.Tensor],
    *,
    card: Card,
    rows: torch.Tensor | None = None,
) -> Path:
    """One float32 safetensors file, `config.json` and a model card: `lvtrain.load_model(folder)` opens it.

    `rows`, the class centres `[C, d]`, are written to a second file if given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    section = {
        "name": architecture.name,
        "embedding_dim": architecture.embedding_dim,
        "image_size": architecture.image_size,
        "overrides": architecture.overrides,
    }
    digest = space_of_state(state)
    card.space = card.space or digest
    config = {
        "model_type": "lvtrain",
        "lvtrain": {"backbone": section, "card": asdict(card), "weights": digest},
        "preprocessing": {
            "colour": "RGB",
            "mean": 127.5,
            "std": 127.5,
            "size": architecture.image_size,
            "aligned": "five points, insightface",
        },
    }
    write_json(folder / CONFIG, config, indent=2)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()},
        str(folder / WEIGHTS),
        metadata={"format": "pt"},
    )
    if rows is not None:
        save_file({"weight": rows.float().contiguous()}, str(folder / ROWS))
    write_card(folder / "README.md", card)
    for name in (WEIGHTS, ROWS):  # safetensors writes files that only their owner may read
        if (folder / name).exists():
            shutil.copymode(folder / CONFIG, folder / name)
    return folder


def write_arcface(path: str | Path, state: Mapping[str, torch.Tensor]) -> None:
    """arcface_torch's `model.pt`: the flat state dict, which its `eval` and `onnx_ijbc` scripts load."""
    save({name: tensor.contiguous() for name, tensor in state.items()}, path)


def save(value: Any, path: str | Path) -> None:
    """`torch.save` that writes the whole file or none. On a full disk torch raises an unclear error and leaves half a file.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        torch.save(value, str(path))
    except RuntimeError as error:
        with contextlib.suppress(OSError):
            Path(path).unlink()
        raise UserError(f"{path} cannot be written; is the disk full, or the folder missing?") from error


def write_insightface(
    folder: str | Path, onnx_file: Path, architecture: Architecture, *, model_id: str, licence: str | None
) -> Path:
    """Writes an insightface V2 package, which `get_model(folder, model_task="recognition")` opens.

    Args:
        folder: holds the ONNX file already.
        onnx_file: the backbone.
        architecture: of the backbone.
        model_id: the package's name.
        licence: of the training data, which the weights inherit; None if it is unknown.
    """
    import hashlib

    folder = Path(folder)
    manifest = {
        "manifest_version": 2,
        "model_id": model_id,
        "license": "MODEL.LICENSE",
        "tasks": {
            "recognition": {
                "file": onnx_file.name,
                "sha256": hashlib.sha256(onnx_file.read_bytes()).hexdigest(),
                "preprocessing": {"mean": 127.5, "std": 127.5},
                "input_size": [architecture.image_size] * 2,
                "embedding_dimension": architecture.embedding_dim,
            }
        },
    }
    write_json(folder / "manifest.json", manifest, indent=2)
    inherited = f"Licence of the training data, which these weights inherit: {licence or 'not stated'}"
    write_text(folder / "MODEL.LICENSE", inherited + "\n")
    return folder


def arcface_ranges(num_classes: int, ranks: int) -> list[tuple[int, int]]:
    """arcface_torch's split: the first `C % W` ranks hold one row more."""
    starts = [num_classes // ranks * rank + min(rank, num_classes % ranks) for rank in range(ranks + 1)]
    return list(itertools.pairwise(starts))


def merge_rows(parts: list[torch.Tensor], *, num_classes: int | None = None) -> torch.Tensor:
    """Class rows of all ranks, in rank order, as one `[C, d]` tensor.

    Raises:
        UserError: a part is missing or is of another run (the sizes are not those of an even split, or do not add up to `num_classes`).
    """
    if not parts:
        raise UserError("no class centres given; name the files of all ranks in order")
    total = sum(len(part) for part in parts)
    if num_classes is not None and total != num_classes:
        raise UserError(
            f"the ranks' rows add up to {total} classes, the dataset has {num_classes}: a file is missing or of another run"
        )
    expected = [stop - start for start, stop in arcface_ranges(total, len(parts))]
    if [len(part) for part in parts] != expected:
        raise UserError(
            f"rows a rank {[len(part) for part in parts]} are not arcface_torch's split of {total} classes over {len(parts)} ranks; check the order"
        )
    if len({part.shape[1] for part in parts}) != 1:
        raise UserError("the ranks' rows have different widths; they are not of one run")
    return torch.cat(parts).float()


def split_rows(rows: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """The rows of each of `ranks` ranks, arcface_torch's split."""
    return [rows[start:stop].clone() for start, stop in arcface_ranges(len(rows), ranks)]


def read_deepspeed(folder: str | Path, tag: str | None = None) -> dict[str, torch.Tensor]:
    """float32 weights of a DeepSpeed ZeRO-1/2/3 checkpoint folder written by anyone, through DeepSpeed's own `zero_to_fp32`.

    That function leaves out parameters that ZeRO-1 did not train; those are read from the module's state in the same folder.
    It unpickles the files, so the folder must be one you trust.

    Raises:
        UserError: not such a folder.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = Path(folder)
    if tag is None and not (folder / "latest").is_file():
        raise UserError(
            f"{folder} has no file `latest`; name the tag with --tag, or give the folder that holds the tags"
        )
    tag = tag or (folder / "latest").read_text().strip()
    try:
        state: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
    except Exception as error:  # damaged files fail in any way that unpickling can
        raise UserError(f"{folder} is not a DeepSpeed ZeRO checkpoint: {' '.join(str(error).split())[:160]}") from error
    whole = {name: tensor.detach().float() for name, tensor in state.items()}
    module_states = folder / tag / "mp_rank_00_model_states.pt"  # of ZeRO-1 and -2; ZeRO-3 writes one a rank, in pieces
    if module_states.is_file():
        content = torch.load(module_states, map_location="cpu", weights_only=False)
        whole = {name: tensor.detach().float() for name, tensor in (content.get("module") or {}).items()} | whole
    return whole
