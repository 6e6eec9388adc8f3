"""Reading a checkpoint: whole tensors or a range of rows, with or without a process group."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lvtrain.checkpoint import files as files
from lvtrain.checkpoint import plan as layout
from lvtrain.distributed import world as worlds
from lvtrain.errors import UserError
from lvtrain.files.patience import patiently
from lvtrain.files.reading import parse_json
from lvtrain.recipe import files as recipes


class Reader:
    """The tensors of a verified checkpoint folder, on the host.

    It notes which tensors were read. `finish` raises an error if some were not.
    """

    def __init__(self, path: Path, content: dict[str, Any], meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self._tensors: dict[str, Any] = content["tensors"]
        self._open: dict[str, Any] = {}
        self._asked: dict[str, int] = {}  # name -> the last row asked for, by any one call

    @property
    def opened(self) -> set[str]:
        """The files read from so far."""
        return set(self._open)

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """The whole tensor's shape, `[total rows, ...]` for rows."""
        return torch.Size(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return files.DTYPES[self._entry(name)["dtype"]]

    def is_rows(self, name: str) -> bool:
        """Whether the tensor is split by rows. If so, read it with `rows`, else with `replicated`."""
        return "pieces" in self._entry(name)

    def replicated(self, name: str) -> torch.Tensor:
        """A tensor that is the same on every rank.

        Raises:
            UserError: the checkpoint has no such tensor, or it is split by rows.
        """
        entry = self._entry(name)
        if "file" not in entry:
            raise UserError(
                f"{self.path}: {name} is split by rows; this run expects it whole (another method or version)"
            )
        self._asked[name] = 0
        return self._checked(name, entry["file"], entry["shape"])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)` of a tensor that is split by rows, from all the files they lie in.

        Raises:
            UserError: the checkpoint has no such tensor, or it has fewer rows.
        """
        entry = self._entry(name)
        if "pieces" not in entry:
            raise UserError(
                f"{self.path}: {name} is not split by rows; this run expects it so (another method or version)"
            )
        total = entry["shape"][0]
        if not 0 <= start <= stop <= total:
            raise UserError(
                f"{self.path}: {name} has {total} rows, this run asks for rows {start} to {stop}: the class counts differ"
            )
        self._asked[name] = max(self._asked.get(name, 0), stop)
        parts = []
        for piece in entry["pieces"]:
            low, high = max(start, piece["start"]), min(stop, piece["stop"])
            if low < high:
                there = slice(low - piece["start"], high - piece["start"])
                shape = [high - low, *entry["shape"][1:]]
                parts.append(self._checked(name, piece["file"], shape, there))
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty((0, *entry["shape"][1:]), dtype=self.dtype(name))

    def finish(self) -> None:
        """Checks that everything in the checkpoint was read. A collective.

        Raises:
            UserError: no rank has read some tensor, or some rows of one.
        """
        asked: dict[str, int] = {}
        for part in worlds.gather_objects(self._asked):
            for name, stop in part.items():
                asked[name] = max(asked.get(name, 0), stop)
        extra = sorted(self._tensors.keys() - asked.keys())
        if extra:
            raise UserError(
                f"{self.path} holds {len(extra)} tensors that this run does not use ({', '.join(extra[:3])}): it was written by another "
                "method or model; use init_from to take weights only"
            )
        for name, stop in asked.items():
            entry = self._tensors[name]
            if "pieces" in entry and stop != entry["shape"][0]:
                raise UserError(
                    f"{self.path}: {name} has {entry['shape'][0]} rows, this run has {stop}: the class counts differ"
                )

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._tensors:
            raise UserError(
                f"{self.path} has no tensor {name}: it was written by another method or model; use init_from to take weights only"
            )
        return self._tensors[name]

    def _checked(self, name: str, file: str, shape: Sequence[int], rows: slice | None = None) -> torch.Tensor:
        """A tensor of a file, or some rows of it, if the shape is as the manifest says."""
        opened = self._file(file)
        if name not in opened.keys():  # noqa: SIM118  (not a dict)
            raise UserError(
                f"{self.path / file} has no tensor {name}, which the manifest lists; restore the checkpoint"
            )
        tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
        if list(tensor.shape) != list(shape):
            raise UserError(
                f"{self.path / file}: {name} is {list(tensor.shape)}, by the manifest {list(shape)}; restore the checkpoint"
            )
        return tensor

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = patiently(_open, self.path / name)
        return self._open[name]


def _open(path: Path) -> Any:
    """Opens a file. A disk that fails is an OSError, whatever safetensors or torch raise for it."""
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, RuntimeError) as error:
        if number := re.search(r"(?:os error |\()(\d+)\)$", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds for evaluation, export and fine-tuning.

    Attributes:
        path: the checkpoint folder.
        step: optimizer steps.
        samples_seen: images.
        phase: name of the phase.
        backbone: parameters and buffers of the method's trained module.
        average: those of the evaluated module's moving average; None if the run kept none.
        recipe: the run's resolved recipe as a plain dict; None if it is missing.
        meta: what `save` was given.
        reader: for the class centres (`classifier.weight`) and everything else.
    """

    path: Path
    step: int
    samples_seen: int
    phase: str
    backbone: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor] | None
    recipe: dict[str, Any] | None
    meta: dict[str, Any]
    reader: Reader


def open_weights(path: str | Path) -> Weights:
    """Opens a checkpoint without a process group, and hashes every file again. Renames nothing.

    Args:
        path: a run folder or its `checkpoints` folder (the newest valid checkpoint is opened), or one checkpoint folder.

    Raises:
        UserError: there is no checkpoint, or none that is intact.
    """
    return _weights(*_newest(Path(path), verify=True))


def open_shapes(path: str | Path) -> dict[str, torch.Size]:
    """The whole shape of every tensor in the checkpoint that `open_weights` would open, by name. Reads only the manifest.

    Raises:
        UserError: there is no checkpoint, or its manifest is damaged.
    """
    _, content = _newest(Path(path), verify=False)
    return {name: torch.Size(entry["shape"]) for name, entry in content["tensors"].items()}


@dataclass(frozen=True)
class Summary:
    """Which run and dataset (by its fingerprint) a checkpoint belongs to, and what `save` was given besides tensors."""

    path: Path
    run_id: str
    fingerprint: str
    meta: dict[str, Any]


def newest_summary(run_folder: Path) -> Summary | None:
    """Summary of a run's newest checkpoint whose manifest and `state.json` are intact; None if there is none."""
    for path in layout.committed(run_folder / "checkpoints"):
        try:
            content = files.read_manifest(path)
        except files.Damage:
            continue
        if files.check_file(path, files.STATE, content) is None:
            meta = parse_json(patiently((path / files.STATE).read_text))["meta"]
            return Summary(path, content["run_id"], content["fingerprint"], meta)
    return None


def _newest(path: Path, *, verify: bool) -> tuple[Path, dict[str, Any]]:
    """The checkpoint folder and its manifest."""
    folder = path if patiently((path / files.MANIFEST).exists) or files.step_of(path) is not None else None
    if folder is not None:
        candidates = [folder]
    else:
        candidates = layout.committed(path / "checkpoints") or layout.committed(path)
    if not candidates or not path.exists():
        raise UserError(f"{path} is neither a run folder with checkpoints nor a checkpoint")
    problems = []
    for candidate in candidates:
        try:
            content = files.read_manifest(candidate)
        except files.Damage as damage:
            problems.append(f"{candidate.name}: {damage}")
            continue
        checks = (files.check_file(candidate, name, content) for name in content["files"] if verify)
        problem = next((found for found in checks if found), None)
        if problem is None:
            return candidate, content
        problems.append(f"{candidate.name}: {problem}")
    raise UserError(f"{path} holds no valid checkpoint ({'; '.join(problems[:3])})")


def _weights(path: Path, content: dict[str, Any]) -> Weights:
    state = parse_json(patiently((path / files.STATE).read_text))
    reader = Reader(path, content, state["meta"])

    def named(*prefixes: str) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix(prefix): reader.replicated(name)
            for prefix in prefixes
            for name in sorted(reader.names)
            if name.startswith(prefix)
        }

    recipe_file = path.parent.parent / "recipe.yaml"
    recipe = recipes.of_run(patiently(recipe_file.read_text)) if patiently(recipe_file.is_file) else None
    return Weights(
        path=path,
        step=content["step"],
        samples_seen=content["samples_seen"],
        phase=content["phase"],
        backbone=named("backbone.param.", "backbone.buffer."),
        average=named("ema.") or None,
        recipe=state["meta"].get("recipe", recipe),
        meta=state["meta"],
        reader=reader,
    )
