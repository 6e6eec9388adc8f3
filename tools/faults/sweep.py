"""Tries every way of failing on every call of an operation, and judges what happens.

A trial is right if

- the operation ends with the same bits as without the fault, or ends with one line and no traceback (a kill needs no line);
- no checkpoint was renamed as damaged;
- the same command, given again, ends with the same bits and leaves no temporary files.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.faults.operations import OPERATIONS, Bench, Operation
from tools.faults.shim import MODES, Mode, Plan

GROUPS = [
    (operation, size, victim)
    for operation in OPERATIONS
    for size, victim in ((1, 0), (2, 0), (2, 1))
    if (operation, size, victim) != ("pack", 2, 0) and (operation != "draw" or size == 1)
]
LEFT_BEHIND = (".writing_*", ".trash_*", "*.tmp", ".*.new", ".*.tmp", ".pack")
CODES = {"lvtrain": {0, 1, 2, 75}, "pack_dataset": {0, 1, 2}, "evaluate": {0, 1, 2}}


@dataclass(frozen=True)
class Site:
    """A call: the `nth` of its kind that the victim makes (from 1), and the `visit`th of its kind on the file `path`."""

    operation: str
    size: int
    victim: int
    call: str
    nth: int
    path: str
    visit: int


@dataclass(frozen=True)
class Trial:
    """One fault at one call, and the verdict."""

    site: Site
    mode: str
    verdict: str  # survived, refused, wrong, not reached
    why: str = ""


class Sweep:
    """Runs trials in the folder `work`, and compares with the result without a fault."""

    def __init__(self, bench: Bench, work: Path) -> None:
        self.bench, self.work = bench, work

    def expected(self, operation: Operation, size: int) -> tuple[dict[str, Any], set[str]]:
        """The result without a fault, and the names of the files that it leaves."""
        with self.bench.making:
            if (operation.name, size) not in self.bench.expected:
                self.bench.fresh(operation, self.work, size)
                codes, output = self.bench.run(operation, self.work, size)
                if any(codes):
                    raise SystemExit(f"{operation.name} fails without any fault, {codes}:\n{output}")
                self.bench.expected[operation.name, size] = self.bench.result(operation, self.work), self._files()
        return self.bench.expected[operation.name, size]

    def _files(self) -> set[str]:
        return {plain(str(path.relative_to(self.work))) for path in self.work.rglob("*")}

    def sites(self, operation: Operation, size: int, victim: int) -> list[Site]:
        """Every call that the victim makes, in order."""
        self.bench.fresh(operation, self.work, size)
        plan = self._plan()
        self.bench.run(operation, self.work, size, plan.path, victim)
        found, numbers, visits = [], Counter[str](), Counter[tuple[str, str]]()
        for call, path in plan.calls():
            place = plain(path.replace(str(self.work), "WORK").replace(str(self.bench.sources), "SOURCES"))
            numbers[call] += 1
            visits[call, place] += 1
            found.append(Site(operation.name, size, victim, call, numbers[call], place, visits[call, place]))
        return found

    def trial(self, site: Site, mode: Mode) -> Trial:
        operation = OPERATIONS[site.operation]
        expected, files = self.expected(operation, site.size)
        self.bench.fresh(operation, self.work, site.size)
        plan = self._plan(mode, site.call, site.nth)
        codes, output = self.bench.run(operation, self.work, site.size, plan.path, site.victim)
        ended_well = codes == [0] * len(codes)
        if not plan.fired():
            return Trial(site, mode.name, "not reached" if ended_well else "wrong", "" if ended_well else _tail(output))
        problem = self._problem(operation, mode, codes, output, expected if ended_well else None)
        # a folder as after an undisturbed run needs no second command
        is_as_ever = self._files() == files and (ended_well or self._was_at_its_end(operation, mode, expected))
        if problem is None and not is_as_ever and (operation.is_repeatable or not ended_well):
            again, output_again = self.bench.run(operation, self.work, site.size)
            problem = self._problem(operation, None, again, output_again, expected)
            problem = problem and f"given again: {problem} | {_tail(output_again)} | before"
        if problem:
            return Trial(site, mode.name, "wrong", f"{problem} | {_tail(output)}")
        last = _lines(output)[-1:]
        return Trial(
            site, mode.name, "survived" if ended_well else "refused", last[0][:300] if last and not ended_well else ""
        )

    def _plan(self, *arguments: Any) -> Plan:
        return Plan(self.work.with_suffix(".plan"), [self.work, self.bench.sources], *arguments)

    def _problem(
        self,
        operation: Operation,
        mode: Mode | None,
        codes: list[int | None],
        output: str,
        expected: dict[str, Any] | None,
    ) -> str | None:
        """What is wrong with an end; None if nothing is.

        `expected` is the result, if there must be one; `mode` is the fault.
        """
        if None in codes:
            return "did not end"
        if any(sign in output for sign in ("Traceback (most recent call last)", "terminate called", "frame #0")):
            return f"a traceback, {codes}"
        if aside := list(self.work.rglob("damaged_*")):
            return f"renamed as damaged: {aside[0].name}"
        if expected is not None:
            if any(codes):
                return f"ended with {codes}: {_lines(output)[-1:]}"
            differing = self._differing(operation, expected)
            # a start removes what the one before could not remove
            left = [path.name for pattern in LEFT_BEHIND for path in self.work.rglob(pattern) if mode is None]
            return f"other bits: {differing[:4]}" if differing else f"left behind {left[:3]}" if left else None
        killed = mode is not None and mode.is_kill
        if not killed:
            errors = [line for line in _lines(output) if re.match(rf"(rank \d+: )?{operation.tool}: error: ", line)]
            if not 1 <= len(errors) <= len(codes):
                return f"{len(errors)} lines of error, {codes}"
            if not any(code in CODES[operation.tool] and code for code in codes):
                return f"exit codes {codes}"
            if operation.tool == "lvtrain" and mode is not None and mode.name != "ENOSPC" and 2 in codes:
                return f"fatal for a chain, {codes}"
        return None

    def _was_at_its_end(self, operation: Operation, mode: Mode, expected: dict[str, Any]) -> bool:
        """Whether the kill came after all work was done, and the same command would only say that."""
        return mode.is_kill and not operation.is_repeatable and not self._differing(operation, expected)

    def _differing(self, operation: Operation, expected: dict[str, Any]) -> list[str]:
        try:
            found = self.bench.result(operation, self.work)
        except RuntimeError as error:
            return [str(error)]
        return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def plain(path: str) -> str:
    """A path without what differs at every start: tokens and process ids."""
    path = re.sub(r"(?<=_\d{9}_)[0-9a-f]{8}|[0-9a-f]{32}", "X", path)
    return re.sub(r"(?<=[.\w])\.\d+(?=\.|$)", ".N", path)


def _lines(output: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if line.strip()]


def _tail(output: str) -> str:
    return " / ".join(_lines(output)[-4:])[-900:]


# -------------------------------------------------------------------------------------------------- which trials


def role(path: str) -> str:
    """What a file is for: its path without numbers (of a step, rank, shard, identity)."""
    return re.sub(r"\d+", "N", path)


def all_of(sites: list[Site], visits: int) -> list[tuple[Site, Mode]]:
    """All modes at all calls. Of the calls of one kind on files of one role, the first `visits` and the last (0: all)."""
    by_role: dict[tuple[str, int, int, str, str], list[Site]] = {}
    for site in sites:
        by_role.setdefault((site.operation, site.size, site.victim, site.call, role(site.path)), []).append(site)
    chosen = {site for some in by_role.values() for site in (some if not visits else [*some[:visits], some[-1]])}
    return [(site, mode) for site in sites if site in chosen for mode in MODES if mode.applies(site.call)]


def in_turns(pairs: list[tuple[Site, Mode]], seed: int) -> list[tuple[Site, Mode]]:
    """The trials, so that any beginning of them is a fair sample: first every cell of the table once, then again.

    A cell is a call and a mode of one operation, ranks and victim. Within a cell every role comes before any comes again.
    """
    chance = random.Random(seed)
    cells: dict[tuple[str, int, int, str, str], list[tuple[Site, Mode]]] = {}
    for site, mode in pairs:
        cells.setdefault((site.operation, site.size, site.victim, site.call, mode.name), []).append((site, mode))
    for cell in cells.values():
        chance.shuffle(cell)
        turns, seen = {}, Counter[str]()
        for site, mode in cell:
            turns[site, mode] = seen[role(site.path)]
            seen[role(site.path)] += 1
        cell.sort(key=lambda pair: turns[pair])
    in_any_order = list(cells.values())
    chance.shuffle(in_any_order)
    turned = itertools.chain.from_iterable(itertools.zip_longest(*in_any_order))
    return [pair for pair in turned if pair]


def carry_out(bench: Bench, pairs: list[tuple[Site, Mode]], jobs: int, log: Path, minutes: float) -> Iterator[Trial]:
    """Runs the trials, `jobs` at the same time, and writes each to `log`.

    A trial that is in `log` is not repeated, unless it was wrong: what was wrong may be corrected since.
    After `minutes` no other trial begins.
    """
    end = time.monotonic() + 60 * minutes
    done = {(trial.site, trial.mode): trial for trial in read_log(log) if trial.verdict != "wrong"}
    free = [Sweep(bench, bench.folder / f"work{job}") for job in range(jobs)]

    def one(pair: tuple[Site, Mode]) -> Trial | None:
        if before := done.get((pair[0], pair[1].name)):
            return before
        if time.monotonic() > end:
            return None
        sweep = free.pop()
        try:
            trial = sweep.trial(*pair)
        finally:
            free.append(sweep)
        with log.open("a") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        return trial

    with ThreadPoolExecutor(jobs) as pool:
        yield from (trial for trial in pool.map(one, pairs) if trial)


def read_log(log: Path) -> list[Trial]:
    """The trials in a log."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [Trial(Site(**one.pop("site")), **one) for one in map(json.loads, lines)]


# ---------------------------------------------------------------------------------------------------------------------- the table


def table(trials: list[Trial]) -> str:
    """The table of calls and modes. A cell is `survived / refused / wrong`."""
    names = [mode.name for mode in MODES]
    cells: dict[tuple[str, str], Counter[str]] = {}
    for trial in trials:
        cells.setdefault((trial.site.call, trial.mode), Counter())[trial.verdict] += 1
    calls = sorted({trial.site.call for trial in trials})
    lines = ["| call | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for call in calls:
        row = [_cell(cells.get((call, name), Counter())) for name in names]
        lines.append(f"| {call} | " + " | ".join(row) + " |")
    totals = [_cell(sum((cells.get((call, name), Counter()) for call in calls), Counter())) for name in names]
    return "\n".join([*lines, "| **all** | " + " | ".join(totals) + " |"]) + "\n"


def _cell(counts: Counter[str]) -> str:
    if not sum(counts[verdict] for verdict in ("survived", "refused", "wrong")):
        return "-"
    wrong = f"**{counts['wrong']}**" if counts["wrong"] else "0"
    return f"{counts['survived']}/{counts['refused']}/{wrong}"


def keep(results: Path, trials: list[Trial], pairs: list[tuple[Site, Mode]], conditions: dict[str, Any]) -> None:
    """Writes syscalls.json (counts, and every trial that was wrong) and syscalls.md.

    Args:
        results: folder.
        trials: that were carried out.
        pairs: all that there are.
        conditions: of the sweep.
    """
    lines = [
        "| what | trials | pairs of call and way | kinds of file | survived | refused | wrong | not reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    tables, groups = [], []
    for group in [*GROUPS, None]:
        own = [trial for trial in trials if group in (None, _group(trial.site))]
        possible = [(site, mode.name) for site, mode in pairs if group in (None, _group(site))]
        if not possible:
            continue
        done = [(trial.site, trial.mode) for trial in own]
        covered = [f"{len(done)} of {len(possible)}"]
        for part in (
            lambda site, mode: (_group(site), site.call, mode),
            lambda site, _: (_group(site), role(site.path)),
        ):
            covered.append(f"{len({part(*one) for one in done})} of {len({part(*one) for one in possible})}")
        verdicts = Counter(trial.verdict for trial in own)
        row = {verdict: verdicts[verdict] for verdict in ("survived", "refused", "wrong", "not reached")}
        what = _who(*group) if group else "**all**"
        lines.append(f"| {what} | " + " | ".join([*covered, *map(str, row.values())]) + " |")
        if group:
            by_cell = Counter((trial.site.call, trial.mode, trial.verdict) for trial in own)
            cells = [[*cell, number] for cell, number in sorted(by_cell.items())]
            groups.append({"what": what, "trials": len(done), "of": len(possible), **row, "cells": cells})
            tables += [f"## {what}", "", table(own)]
    wrong = [asdict(trial) for trial in trials if trial.verdict == "wrong"]
    results.mkdir(parents=True, exist_ok=True)
    found = {"conditions": conditions, "groups": groups, "wrong": wrong}
    (results / "syscalls.json").write_text(json.dumps(found) + "\n")
    (results / "syscalls.md").write_text("\n".join([HEADING, *lines, "", *tables]))


def _group(site: Site) -> tuple[str, int, int]:
    return site.operation, site.size, site.victim


def _who(operation: str, size: int, victim: int) -> str:
    if operation == "pack":
        return "pack, one process" if size == 1 else f"pack, {size} workers, the fault in a worker"
    return f"{operation}, " + ("1 rank" if size == 1 else f"{size} ranks, the fault on rank {victim}")


HEADING = """# What happens if a system call fails?

`python -m tools.faults` repeats five operations: save, resume, pack, evaluate, and `draw` (an
evaluation that also draws plots). In each trial one system call on their files fails
([how](../faults/README.md)).

A trial is

- **survived**, if the command succeeded, with the same bits as without the fault;
- **refused**, if the command ended with a one-line error or was killed, and the same command then
  succeeded with the same bits;
- **wrong** in all other cases, also if a checkpoint was renamed as damaged.

There are more possible trials than we ran. A trial is defined by the call, the way in which it
fails, and the kind of file. The call fails at its first or at its last use. The sweep first tries
each pair of a call and a way once, then the same pairs on other files. So the trials that were run
are a fair sample of all. The first table shows how many of all trials, pairs and kinds of file were
tried.

"Not reached" means that the command did not make this call. A continued sweep repeats wrong trials,
so `wrong` counts those that are still wrong. In the tables of single operations, a cell has the
numbers of survived/refused/wrong trials.
"""
