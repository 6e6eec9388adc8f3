"""Kills over all methods: each quick start's recipe, smaller and shorter, is killed again and again until it is done.

`tools/torture.py --only kill` runs it. A kill is SIGKILL of one rank or of all, at a random instant of the start or of
the training, or at a random point of a save. Whenever a run ends, its checkpoint and its metrics are compared byte by byte
with those of an undisturbed run. Every kill is written to `kills.jsonl`, and killing goes on from there.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.trial import Bench, end, kill, last_step, newest_committed

TOTAL, EVERY, BATCH = 18, 3, 16
VIT = ["backbone.overrides={dim: 32, depth: 2, heads: 2, drop_path: 0.1}", "backbone.embedding_dim=32"]
FVIT = ["backbone.embedding_dim=32"] + [
    f"backbone.overrides.{key}"
    for key in ("dim=32", "depth=2", "heads=2", "head_dim=16", "mlp_dim=64", "drop_path=0.1")
]
SHORT = [
    f"schedule.total={TOTAL} steps",
    "schedule.warmup=2 steps",
    f"checkpoint.every={EVERY} steps",
    "logging={every: 1, trackers: []}",
    "evaluation.benchmarks={}",
    "data.block=8",
    f"phases.0.global_batch={BATCH}",
    "phases.0.micro_batches=4",
]
PHASES = [f"phases.{phase}.{key}" for phase in (1, 2) for key in (f"global_batch={BATCH}", "micro_batches=4")]
POINTS = (
    "save.after_mkdir",
    "save.mid_file",
    "save.after_files",
    "save.before_vote",
    "save.before_manifest",
    "save.mid_manifest",
    "save.before_rename",
    "save.after_rename",
    "retention.renamed",
    "save.after_commit",
)


@dataclass(frozen=True)
class Victim:
    """A method's run: its recipe, what makes it smaller, its ZeRO stage, and a key that names another method's run."""

    recipe: str
    small: tuple[str, ...]
    zero: int = 1
    key: str = ""
    source: str = ""


VICTIMS = {
    "pco": Victim(
        "quickstart",
        (
            *(*VIT, *PHASES, "method.window=3"),
            *("phases.alignment.end={at_most: 6 steps}", "phases.stabilisation.end={at_most: 6 steps}"),
        ),
        2,
    ),
    "cluster": Victim("cluster_quickstart", (*VIT, "method.warmup=4 steps"), 2),
    "part_fvit": Victim("part_fvit_quickstart", (*FVIT, "backbone.image_size=56")),
    "lafs": Victim("lafs_quickstart", tuple(FVIT), 1, "method.landmark_weights", "part_fvit"),
    "dino": Victim("dino_quickstart", tuple(FVIT)),
    "finetune": Victim("finetune_fvit_quickstart", tuple(FVIT), 1, "init_from.path", "dino"),
    "distill": Victim("distill_quickstart", tuple(VIT), 2, "method.distill.teacher", "pco"),
}


def benches(folder: Path, limit: float) -> Iterator[tuple[str, Bench]]:
    """(method, bench) of every method, in an order in which sources come first."""
    undisturbed: dict[str, Path] = {}
    for method, victim in VICTIMS.items():
        source = [f"{victim.key}={undisturbed[victim.source]}"] if victim.key else []
        bench = Bench(
            *(folder / method, victim.zero, limit),
            *source,
            recipe=victim.recipe,
            small=[*SHORT, *victim.small],
            data=folder / "faces",
        )
        undisturbed[method] = bench.undisturbed() / "quickstart"
        yield method, bench


def kills(folder: Path, count: int, seed: int, limit: float = 600.0) -> Iterator[dict[str, Any]]:
    """Kills the runs of all methods, `count` times in all, and finishes them. Yields a record of each kill and each end."""
    log = folder / "kills.jsonl"
    before = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    yield from before
    shares = {method: count // len(VICTIMS) + (i < count % len(VICTIMS)) for i, method in enumerate(VICTIMS)}
    for method, bench in benches(folder, limit):
        own = [record for record in before if record["method"] == method]
        done = sum("victim" in record for record in own)
        chance = random.Random(f"{seed} {method} {done}")
        while done < shares[method]:
            record = {"method": method} | _kill(bench, chance)
            done += "victim" in record
            _keep(log, record)
            yield record
        if not own or own[-1].get("last") is None:
            record = {"method": method, "last": True} | _end(bench, bench.run(bench.folder / "runs"))
            _keep(log, record)
            yield record


def _keep(log: Path, record: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _end(bench: Bench, codes: list[int | None]) -> dict[str, Any]:
    """A run that ended by itself: exit codes, and what differs from the undisturbed run. The next start is a new run."""
    runs = bench.folder / "runs"
    record = {"codes": codes, "differ": bench.differing(runs) if codes == [0, 0] else [bench.last_line(runs)]}
    if not record["differ"]:
        shutil.rmtree(runs)
    return record


def _kill(bench: Bench, chance: random.Random) -> dict[str, Any]:
    """One start that is killed. If it ended before the kill, it is judged, and there is no `victim` in the record."""
    runs = bench.folder / "runs"
    before = newest_committed(runs)
    victim = chance.choice(["0", "1", "*"])
    detail: dict[str, Any] = {}
    if chance.random() < 0.5:
        point = chance.choice(POINTS)
        step = min(TOTAL, before + EVERY * chance.randint(1, 2))
        victim = "0" if "manifest" in point or "rename" in point else victim
        detail = {"point": point, "step": step}
        codes = end(bench.start(runs, 2, f"{point}:{victim}:{step}:sigkill"), bench.limit)
    else:
        processes = bench.start(runs)
        at = before + chance.randint(1, 2 * EVERY) if chance.random() < 0.7 else 0  # 0: while it starts
        delay = chance.uniform(0.0, 0.1 if at else 2.0)
        limit = time.monotonic() + bench.limit
        while last_step(runs) < at and all(process.is_alive() for process in processes) and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(delay)
        for process in [processes[int(victim)]] if victim != "*" else processes:
            kill(process)
        detail = {"at": at, "delay": round(delay, 2)}
        codes = end(processes, 20.0)
    if -signal.SIGKILL not in codes:
        return _end(bench, codes)
    return {"victim": victim, "codes": codes, "reached": last_step(runs), "committed": newest_committed(runs)} | detail
