"""Proves the CUDA path on this machine's GPU: `bash tools/gpu_proof.sh [--minutes 10]`.

Parts run one after the other, most important first (`parts.py`). A part that needs a package that is missing is named,
and so is one that the time was too short for. After each part its JSON and the page are written.

Exit codes: 0 every part that ran met its goals; 1 a part failed or missed a goal; 2 there is no GPU to prove anything on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.proof import child
from tools.proof.page import page
from tools.proof.part import Ended, Part
from tools.proof.parts import PARTS

_LEAST = 5.0  # seconds; with less, a part is not begun


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the proof; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_proof", description="Prove the CUDA path on this machine's GPU.")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--only", default="", metavar="PART,...", help=", ".join(part.name for part in PARTS))
    parser.add_argument(
        "--out", type=Path, default=Path("tools/results/gpu"), help="where the JSON files and the page go"
    )
    parser.add_argument("--small", action="store_true", help="a rehearsal: each part at a size that takes seconds")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else [part.name for part in PARTS]
    if unknown := set(chosen) - {part.name for part in PARTS}:
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}")
    parts = [part for part in PARTS if part.name in chosen or part.name == "environment"]
    options.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["bash tools/gpu_proof.sh", *(sys.argv[1:] if arguments is None else arguments)])
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="gpu_proof_") as folder:
        done: list[Ended] = []
        for part in parts:
            blind = bool(done) and not done[0].result.get("gpu")
            one = ended(part, Path(folder), until, small=options.small, why_not=_blind(done[0]) if blind else "")
            done.append(one)
            _report(one, options.out)
            rest = [Ended(later, "skipped", why="not yet begun") for later in parts[len(done) :]]
            (options.out / "README.md").write_text(page([*done, *rest], command, time.strftime("%Y-%m-%d")))
    print(f"page: {options.out / 'README.md'}")
    if not done[0].result.get("gpu"):
        return 2
    return 0 if all(one.is_good for one in done if one.state in ("ran", "failed")) else 1


def _blind(environment: Ended) -> str:
    return f"torch sees no GPU ({environment.result.get('reason') or environment.why or 'no reason given'})"


def ended(part: Part, folder: Path, until: float, *, small: bool, why_not: str) -> Ended:
    """Runs a part, or says why it does not. `until`: when the time of the whole proof is over. `why_not`: a reason not to."""
    missing = [name for name in ("torch", *part.needs) if not _is_installed(name)]
    if part.name != "environment" and (why_not or missing):
        return Ended(part, "not run", why=why_not or f"needs {', '.join(missing)}, not installed here")
    left = until - time.monotonic()
    if left < _LEAST:
        return Ended(part, "skipped", why="the time was over")
    options = part.options | (part.small if small else {})
    return child.run(part, options, folder, min(part.seconds, left))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _report(one: Ended, out: Path) -> None:
    name = one.part.name
    goals = [
        {"goal": goal.text, "figure": goal.value(one.result), "met": goal.is_met(one.result)} for goal in one.part.goals
    ]
    row = {
        "part": name,
        "state": one.state,
        "seconds": one.seconds,
        "why": one.why,
        "goals": goals,
        "result": one.result,
        "log": one.log,
    }
    (out / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
    missed = [goal["goal"] for goal in goals if not goal["met"]] if one.state == "ran" else []
    print(
        f"{name}: {one.state} ({one.seconds:g} s) {one.why}{'missed: ' + '; '.join(map(str, missed)) if missed else ''}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
