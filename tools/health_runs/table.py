"""Writes what `tools/health.py` found to tools/results/health.json and health.md."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def write_results(runs: list[Any], folder: Path) -> None:
    """The recall of each fault over its seeds, and what was named in healthy runs."""
    faults: dict[str, list[Any]] = defaultdict(list)
    for run in runs:
        if run.is_fault:
            faults[run.name].append(run)
    healthy = [run for run in runs if not run.is_fault]
    rows = {name: _row(of) for name, of in faults.items()}
    found, tried = sum(row["named"] for row in rows.values()), sum(row["runs"] for row in rows.values())
    alarms = {f"{run.name} ({run.seed})": run.named for run in healthy if run.named}
    failed = [run.name for run in healthy if run.error]
    result = {
        "recall": round(found / max(1, tried), 4),
        "runs": tried,
        "healthy": len(healthy),
        "false_alarms": alarms,
        "failed": failed,
        "seeds": sorted({run.seed for run in runs if run.is_fault}),
        "healthy_seeds": sorted({run.seed for run in healthy}),
        "faults": rows,
        "healthy_runs": [run.name for run in healthy],
    }
    (folder / "health.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "health.md").write_text("\n".join(_page(result)) + "\n")


def _row(runs: list[Any]) -> dict[str, Any]:
    named = [[step for cause, step in run.named.items() if cause in run.expected] for run in runs]
    steps = [min(each) for each in named if each]
    others = sorted({cause for run in runs for cause in run.named} - set(runs[0].expected))
    return {
        "expected": list(runs[0].expected),
        "named": len(steps),
        "runs": len(runs),
        "latest_step": max(steps, default=None),
        "also_named": others,
    }


def _page(result: dict[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [
        "# Faults that the health check names",
        "",
        "Small real trainings, each with one fault; and healthy ones. Generated faces of 40 pixels, 64",
        "identities, a ViT of two blocks, 200 steps at most; two ranks where the fault needs them.",
        "",
        f"- **Recall {result['recall']:.1%}** ({result['runs']} runs, seeds {seeds}).",
        f"- **False alarms: {len(result['false_alarms'])} of {result['healthy']} healthy runs** "
        f"(seed {', '.join(map(str, result['healthy_seeds']))}).",
        "- Thresholds were chosen on seed 1: other faces, other draws.",
        "- Command: `python tools/health.py --write`.",
        "",
        "| fault | named | by step | as | also named |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in result["faults"].items():
        step = "-" if row["latest_step"] is None else row["latest_step"]
        lines.append(
            f"| {name} | {row['named']} of {row['runs']} | {step} | {', '.join(row['expected'])} | "
            f"{', '.join(row['also_named'])} |"
        )
    lines += ["", "Step 0 is before training: from the recipe, the labels, or both.", "", "## Healthy runs", ""]
    lines += [f"- {name}" for name in result["healthy_runs"]]
    return lines
