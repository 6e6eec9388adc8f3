"""`runs/NAME/slurm/attempts.jsonl`: what was submitted, started and ended, one line each. Lines are only appended.

A job that dies suddenly (node failure, time limit) leaves a start without an end. Such attempts count too, because
progress is judged by the committed steps at starts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvtrain.files.reading import read_records

Record = dict[str, Any]


class Ledger:
    """Records are dicts with `time` (seconds since 1970) and `event`.

    Events are chain (a submission by hand), submit (of a job), start and end (of an attempt), ended (Slurm or a user
    ended the job) and stop.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self.clock = Path(folder) / "attempts.jsonl", clock

    def add(self, event: str, **values: Any) -> Record:
        record = {"time": round(self.clock(), 3), "event": event, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return record

    def read(self) -> list[Record]:
        """All records; a line that a crash cut short is skipped."""
        return read_records(self.path, "event", str)[0]

    def this_chain(self) -> list[Record]:
        """The records since the last submission by hand, which resets the counts."""
        records = self.read()
        starts = [number for number, record in enumerate(records) if record["event"] == "chain"]
        return records[starts[-1] :] if starts else records

    def next_attempt(self) -> int:
        return 1 + max((record["attempt"] for record in self.read() if record["event"] == "start"), default=0)

    def fruitless(self, phase: str, step: int) -> int:
        """How many attempts at this phase started at `step`, or later if a checkpoint was lost, and made no progress."""
        starts = (r for r in self.this_chain() if r["event"] == "start" and r["phase"] == phase)
        return sum(record["step"] >= step for record in starts)

    def jobs(self, phase: str | None = None) -> list[int]:
        """Ids of the jobs submitted for this chain (and phase), in order."""
        submits = (r for r in self.this_chain() if r["event"] == "submit" and phase in (None, r["phase"]))
        return [record["job"] for record in submits]

    def suspects(self, phase: str) -> list[str | None]:
        """The node blamed for each ended attempt at this phase, in order."""
        return [r.get("suspect") for r in self.this_chain() if r["event"] == "end" and r["phase"] == phase]
