"""Makes the curve of a card from runs of several seeds: `python -m lvtrain.health.make_curve SOURCE runs/A runs/B > CARD.json`."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.health.curves import AT_MOST, EARLIER_OR_LATER


def make_curve(folders: list[Path], source: str) -> dict[str, Any]:
    """The values of a curve of ours: the loss of each run at the epochs that all have logged, and the ends of phases.

    The ends of phases are those of the earliest and of the latest run, widened as the band is.
    """
    runs = [_rows(folder / "metrics.jsonl") for folder in folders]
    events = [_rows(folder / "events.jsonl") for folder in folders]
    facts = json.loads((folders[0] / "environment.json").read_text())
    shared = sorted(set.intersection(*({row["epoch"] for row in rows if row["loss"] is not None} for rows in runs)))
    losses = [{row["epoch"]: round(row["loss"], 3) for row in rows} for rows in runs]
    return {
        "source": source,
        "differs": {},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "data": {"num_classes": facts["identities"], "num_samples": facts["images"]},
        "epochs": shared,
        "loss_by_seed": [[loss[epoch] for epoch in shared] for loss in losses],
        "phase_ends": _phase_ends(events, facts["images"]),
    }


def _phase_ends(events: list[list[dict[str, Any]]], images: int) -> dict[str, list[float]]:
    ends: dict[str, list[float]] = {}
    for rows in events:
        for row in rows:
            if row["event"] == "phase_end" and row["reason"] == "cos2":
                ends.setdefault(row["phase"], []).append(row["samples_seen"] / images)
    return {
        name: [
            round(at - min(EARLIER_OR_LATER * at, AT_MOST), 2),
            round(last + min(EARLIER_OR_LATER * last, AT_MOST), 2),
        ]
        for name, found in ends.items()
        if len(found) == len(events)
        for at, last in [(float(np.min(found)), float(np.max(found)))]
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    print(json.dumps(make_curve([Path(each) for each in sys.argv[2:]], sys.argv[1])))
