"""Which rank writes which tensor, and which checkpoints are kept. Every rank decides the same without communication."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvtrain.checkpoint import files as files
from lvtrain.checkpoint.state import Replicated, State
from lvtrain.files.patience import patiently


@dataclass(frozen=True)
class Entry:
    """Description of one rank's tensor, for the other ranks. `rows` is (start, stop, total); None for a replicated one."""

    dtype: str
    shape: tuple[int, ...]
    rows: tuple[int, int, int] | None
    here: bool  # whether the rank has the data, or only dtype and shape
    size: int


@dataclass(frozen=True)
class Plan:
    """What this rank writes, and the manifest's table.

    Attributes:
        mine: the tensors that this rank writes.
        given: names of those that are private host copies already.
        tensors: where each tensor lies, for the manifest.
        total_bytes: of all ranks.
    """

    mine: dict[str, torch.Tensor]
    given: frozenset[str]
    tensors: dict[str, Any]
    total_bytes: int


def file_name(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def describe(state: State) -> dict[str, Entry]:
    """What the other ranks must know of this rank's tensors, by name."""
    described = {}
    for name, saved in state.items():
        tensor = saved.tensor
        rows = None if isinstance(saved, Replicated) else (saved.start, saved.stop, saved.total)
        size = tensor.numel() * tensor.element_size()
        described[name] = Entry(
            files.DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), rows, tensor.device.type != "meta", size
        )
    return described


def plan(state: State, rank: int, ranks: list[dict[str, Entry]]) -> Plan:
    """Distributes the tensors over the ranks.

    A rank writes its own rows. A replicated tensor is written by the rank with least to write among those that hold it.

    Args:
        state: this rank's tensors.
        rank: this rank.
        ranks: `describe` of every rank.

    Raises:
        RuntimeError: ranks disagree on a tensor, or the rows do not cover their tensor exactly once.
    """
    for other, described in enumerate(ranks):
        if described.keys() != ranks[0].keys():
            raise RuntimeError(
                f"rank {other} and rank 0 save different tensors: {sorted(described.keys() ^ ranks[0].keys())[:4]}"
            )
    load = [0] * len(ranks)
    table: dict[str, Any] = {}
    writers: dict[str, set[int]] = {}
    for name in sorted(ranks[0]):
        entries = [described[name] for described in ranks]
        same = {
            (entry.dtype, entry.shape if entry.rows is None else (entry.shape[1:], entry.rows[2])) for entry in entries
        }
        if len(same) > 1 or len({entry.rows is None for entry in entries}) > 1:
            raise RuntimeError(f"the ranks disagree on {name}: {sorted(map(str, same))}")
        if entries[0].rows is not None:
            writers[name] = _plan_rows(name, entries, table, load)
    for name, first in ranks[0].items():
        if first.rows is None:
            having = [r for r, described in enumerate(ranks) if described[name].here]
            if not having:
                raise RuntimeError(f"no rank has the data of {name}")
            owner = min(having, key=lambda r: (load[r], r))
            load[owner] += first.size
            writers[name] = {owner}
            table[name] = {"dtype": first.dtype, "shape": list(first.shape), "file": file_name(owner)}
    mine = {name: saved.tensor for name, saved in state.items() if rank in writers[name]}
    given = frozenset(name for name, saved in state.items() if isinstance(saved, Replicated) and saved.given)
    return Plan(mine, given, table, sum(load))


def _plan_rows(name: str, entries: list[Entry], table: dict[str, Any], load: list[int]) -> set[int]:
    ranges: dict[tuple[int, int], int] = {}
    for rank, entry in enumerate(entries):
        assert entry.rows is not None
        start, stop, total = entry.rows
        if stop > start and (start, stop) not in ranges:  # the same rows on several ranks are written once
            ranges[start, stop] = rank
            load[rank] += entry.size
    ordered = sorted(ranges)
    if [start for start, _ in ordered] + [total] != [0] + [stop for _, stop in ordered]:
        raise RuntimeError(f"the rows of {name} on the ranks, {ordered}, are not [0, {total}) cut into pieces")
    table[name] = {
        "dtype": entries[0].dtype,
        "shape": [total, *entries[0].shape[1:]],
        "pieces": [{"file": file_name(ranges[piece]), "start": piece[0], "stop": piece[1]} for piece in ordered],
    }
    return set(ranges.values())


def committed(folder: Path) -> list[Path]:
    """The folders that are named like checkpoints, newest first, whatever they hold.

    Raises:
        OSError: the file system kept failing. There may be checkpoints.
    """

    def look() -> list[Path]:
        if not folder.is_dir():
            return []
        return [path for path in folder.iterdir() if files.step_of(path) is not None and path.is_dir()]

    there = patiently(look)
    return sorted(there, key=lambda path: files.step_of(path) or 0, reverse=True)


def superseded(folder: Path, keep_last: int, keep_every_samples: int | None) -> list[Path]:
    """The committed checkpoints that need not be kept, oldest first.

    Kept are the `keep_last` newest, those marked `keep`, the first past each multiple of `keep_every_samples`, and those
    that cannot be read.
    """
    drop = []
    before = 0
    for position, path in enumerate(reversed(newest_first := committed(folder))):
        try:
            content = files.read_manifest(path)
        except files.Damage:
            continue
        samples = content["samples_seen"]
        passed = keep_every_samples is not None and samples // keep_every_samples > before // keep_every_samples
        before = samples
        if position < len(newest_first) - keep_last and not content["keep"] and not passed:
            drop.append(path)
    return drop
