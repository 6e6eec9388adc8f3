"""What a run reports: `metrics.jsonl`, `events.jsonl`, the console and trackers.

Rank 0 writes. The other ranks report only what they alone saw.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from lvtrain import signals
from lvtrain.checkpoint.lease import Fence
from lvtrain.distributed.world import World
from lvtrain.evaluation import suite
from lvtrain.files import atomic
from lvtrain.files.reading import read_records
from lvtrain.training.trackers import TRACKERS, TrackedRun, Tracker, TrackerSection


class Telemetry:
    """Rows of `metrics.jsonl` and `events.jsonl`, appended whole lines at a time, and sent to the recipe's trackers.

    Args:
        run: what trackers are given.
        world: this process among the ranks.
        trackers: sections of the recipe.
        fence: of the run folder. A job that was suspended and replaced writes nothing when it continues.

    Raises:
        FolderInUse: by every method that writes a file: another job now holds the folder.
    """

    def __init__(
        self, run: TrackedRun, world: World, trackers: Sequence[TrackerSection] = (), fence: Fence | None = None
    ) -> None:
        self.folder, self.world, self.active, self._fence = run.folder, world, world.is_first, fence
        self._trackers: dict[str, Tracker] = {}
        for section in trackers if self.active else ():
            try:
                self._trackers[section.name] = TRACKERS.get(section.name)(section, run)
            except Exception as error:
                self._switch_off(section.name, error)

    def begin(self, step: int) -> None:
        """Resumes at `step`: rows of later steps are dropped, because they will be written again."""
        path = self.folder / "metrics.jsonl"
        if self.active and path.exists():
            self.check_fence()
            rows, dropped = read_records(path, "step", int)
            if dropped:
                self.say(f"warning: {path}: {dropped} damaged lines are dropped; a crash may have cut one short")
            rows = [row for row in rows if row["step"] <= step]
            atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._track("begin", step)

    def metrics(self, row: dict[str, Any]) -> None:
        if self.active:
            row = {"time": round(time.time(), 3), **row}
            self._append("metrics.jsonl", row)
            self._track("metrics", row)

    def event(self, event: str, **fields: Any) -> None:
        """One row of `events.jsonl`."""
        if self.active:
            self.event_of_rank(event, **fields)

    def event_of_rank(self, event: str, **fields: Any) -> None:
        """One row of `events.jsonl` from any rank, about what only this rank saw, such as an image it could not decode."""
        row = {"time": round(time.time(), 3), "event": event, **fields}
        self._append("events.jsonl", row)
        self._track("event", row)

    def evaluation(self, name: str, results: dict[str, Any]) -> None:
        """Writes `evaluation/NAME.json`, and the first figure of each benchmark to the console."""
        for benchmark, result in results["benchmarks"].items():
            figure, value = suite.headline(result)[0]
            self.say(f"evaluation {name}  {benchmark}: {figure} {value}")
        if not self.active:
            return
        self.check_fence()
        folder = self.folder / "evaluation"
        folder.mkdir(exist_ok=True)
        atomic.write_json(folder / f"{name}.json", results)

    def say(self, text: str) -> None:
        """Prints a line on rank 0."""
        if self.active:
            _print(text)

    def warn(self, text: str) -> None:
        """Prints what only this rank saw, such as a file system that fails on its node."""
        _print(f"warning: rank {self.world.rank}: {text}")

    def check_fence(self) -> None:
        """Checks that this job still holds the run folder, before something is written there.

        Raises:
            FolderInUse: another job holds it.
        """
        if self._fence is not None:
            self._fence.check()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        self.check_fence()
        with open(self.folder / name, "ab+") as file:
            end = file.tell()
            file.seek(max(0, end - 1))
            cut = end > 0 and file.read(1) != b"\n"  # a crash cut the last row; the new one must start on a new line
            file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")

    def _track(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                del self._trackers[name]
                self._switch_off(name, error)

    def _switch_off(self, name: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        self.event("tracker_off", tracker=name, reason=reason)
        self.say(f"warning: the tracker {name} failed and is off for this start ({reason}); training continues")

    def close(self) -> None:
        self._track("close")


def progress_line(row: dict[str, Any], *, phase: str, seconds_left: float) -> str:
    """The console line of a log row. Its fields are those of arcface_torch, so that log parsers read it."""
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


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:  # the terminal is closed, or the program that read our lines has ended; the run folder has them
        signals.drop_console()
