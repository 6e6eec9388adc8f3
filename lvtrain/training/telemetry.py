"""What a run says of itself: metrics.jsonl, TensorBoard, events.jsonl and one progress line. Rank 0 writes; others only what they alone saw."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lvtrain.distributed.world import World


class Telemetry:
    """Rows of `metrics.jsonl` and `events.jsonl`, appended whole lines at a time.

    A resumed run goes back to its checkpoint's step, so rows of later steps are dropped first (`forget_after`): they are about to be made again.
    """

    def __init__(self, folder: Path, world: World, *, tensorboard: bool) -> None:
        self.folder, self.world, self.active = folder, world, world.is_first
        self._writer: Any = None
        if self.active and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=30)

    def forget_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if not self.active or not path.exists():
            return
        rows = [row for row in _whole_lines(path) if row["step"] <= step]
        fresh = path.with_suffix(".jsonl.new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(fresh, path)

    def metrics(self, row: dict[str, Any]) -> None:
        if not self.active:
            return
        row = {"time": round(time.time(), 3), **row}
        self._append("metrics.jsonl", row)
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("time", "step"):
                    self._writer.add_scalar(f"train/{name}", value, row["step"])

    def event(self, event: str, *, any_rank: bool = False, **fields: Any) -> None:
        """One row of events.jsonl; `any_rank` for what only this rank saw (a sample it could not decode)."""
        if not (self.active or any_rank):
            return
        self._append("events.jsonl", {"time": round(time.time(), 3), "event": event, **fields})

    def evaluation(self, name: str, results: dict[str, Any], step: int) -> None:
        """Writes evaluation/NAME.json and the headline figures to TensorBoard."""
        if not self.active:
            return
        folder = self.folder / "evaluation"
        folder.mkdir(exist_ok=True)
        fresh = folder / f".{name}.json.new"
        fresh.write_text(json.dumps(results))
        os.replace(fresh, folder / f"{name}.json")
        if self._writer is not None:
            for benchmark, figures in results["benchmarks"].items():
                self._writer.add_scalar(f"evaluation/{benchmark}", figures["accuracy"], step)

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """What only this rank saw (a file system that fails its node), said by any rank."""
        print(f"warning: rank {self.world.rank}: {text}", flush=True)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def progress_line(row: dict[str, Any], *, phase: str, seconds_left: float) -> str:
    """The line a person watches: `Speed` first, as arcface_torch's users (and their log parsers) know it."""
    parts = [
        f"Speed {row['images_per_second']:.2f} samples/sec",
        f"Loss {row['loss']:.4f}" if row["loss"] is not None else "Loss not finite",
        f"cos2 {row['cos2']:.3f}" if row.get("cos2") is not None else "",
        f"LearningRate {row['lr']:.6f}",
        f"Phase: {phase}",
        f"Epoch: {row['epoch']:.2f}",
        f"Global Step: {row['step']}",
        f"data wait {100 * row['data_wait']:.0f}%",
        f"Required: {_clock(seconds_left)}",
    ]
    return "  ".join(part for part in parts if part)


def _clock(seconds: float) -> str:
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds // 60}:{seconds % 60:02d}"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file; a last line cut short by a crash is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: dropped a line cut short", file=sys.stderr)
    return rows
