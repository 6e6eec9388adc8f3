"""A trainer in miniature for the chain's protocol: ranks, steps, checkpoints, exit codes, outcome.json, fault points, as lvtrain/main.py.

It starts in a blink because it does without torch: the ranks talk over one socket. The "model" is a number that depends on every step
once, in order. At the fault point `loop.step` the word `fatal` means an error that another start would only repeat.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import yaml

from lvtrain import faults, signals
from lvtrain.training import outcome

EVERY = 5  # steps from checkpoint to checkpoint


class Ranks:
    """Two ranks that exchange a number a step: MASTER_ADDR is the chain's word, the rest Slurm's own variables."""

    def __init__(self) -> None:
        self.rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        assert size == 2 and os.environ["SLURM_NNODES"] == "2"
        address = (os.environ["MASTER_ADDR"], 20000 + int(os.environ["SLURM_JOB_ID"]))
        deadline = time.monotonic() + 120
        if self.rank == 0:
            with socket.create_server(address) as server:
                server.settimeout(120)
                self.peer, _ = server.accept()
                self.peer.settimeout(None)
        else:
            self.peer = self.connect(address, deadline)
        self.lines = self.peer.makefile("r")

    def connect(self, address: tuple[str, int], deadline: float) -> socket.socket:
        while True:
            try:
                return socket.create_connection(address)
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def both(self, number: int) -> tuple[int, int]:
        """This rank's number and the other's, rank 0's first."""
        self.peer.sendall(f"{number}\n".encode())
        other = int(self.lines.readline())
        return (number, other) if self.rank == 0 else (other, number)


def main() -> int:
    signals.listen()
    parser = argparse.ArgumentParser()
    for option in ("--recipe", "--ds_config", "--phase"):
        parser.add_argument(option, required=True)
    parser.add_argument("--max-time", type=float, required=True)
    given = parser.parse_args()
    recipe = yaml.safe_load(Path(given.recipe).read_text())
    names = [phase["name"] for phase in recipe["phases"]]
    folder = Path(recipe["runs"]) / recipe["name"]
    last = (names.index(given.phase) + 1) * int(recipe["schedule"]["total"].split()[0]) // len(names)
    step, value = restore(folder)
    ranks = Ranks()
    while step < last:
        if faults.point("loop.step", rank=ranks.rank, step=step) == "fatal":
            return end(folder, ranks, "fatal", given.phase, step, "the recipe asks for the impossible")
        contribution = sum(ranks.both(step + ranks.rank))
        value = hashlib.sha256(f"{value}{step}{given.phase}{contribution}".encode()).hexdigest()
        step += 1
        stop = any(ranks.both(int(signals.received() is not None)))
        if stop or step % EVERY == 0 or step == last:
            save(folder, ranks, step, value)
        if stop and step < last:
            return end(folder, ranks, "requeue", given.phase, step, "a signal")
    return end(folder, ranks, "done", given.phase, step, "the phase is over")


def restore(folder: Path) -> tuple[int, str]:
    found = sorted(path.parent for path in folder.glob("checkpoints/step_*/manifest.json"))
    if not found:
        return 0, ""
    state = json.loads((found[-1] / "state.json").read_text())
    return state["step"], state["value"]


def save(folder: Path, ranks: Ranks, step: int, value: str) -> None:
    target = folder / "checkpoints" / f"step_{step:09d}"
    if ranks.rank == 0 and not target.exists():
        beside = target.with_name(".new")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / "state.json").write_text(json.dumps({"step": step, "value": value}))
        (beside / "manifest.json").write_text("{}")
        beside.rename(target)
    ranks.both(0)


def end(folder: Path, ranks: Ranks, verdict: outcome.Verdict, phase: str, step: int, reason: str) -> int:
    ended = outcome.Outcome(verdict, phase, step, reason, 1)
    if ranks.rank == 0:
        outcome.write(folder, ended)
    ranks.both(0)
    return ended.exit_code


if __name__ == "__main__":
    sys.exit(main())
