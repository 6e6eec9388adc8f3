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
    if (operation, size, victim) != ("pack", 2, 0)
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
        self._expected: dict[tuple[str, int], dict[str, Any]] = {}

    def expected(self, operation: Operation, size: int) -> dict[str, Any]:
        if (operation.name, size) not in self._expected:
            self.bench.fresh(operation, self.work, size)
            codes, output = self.bench.run(operation, self.work, size)
            if any(codes):
                raise SystemExit(f"{operation.name} fails without any fault, {codes}:\n{output}")
            self._expected[operation.name, size] = operation.result(self.work)
        return self._expected[operation.name, size]

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
        expected = self.expected(operation, site.size)
        self.bench.fresh(operation, self.work, site.size)
        plan = self._plan(mode, site.call, site.nth)
        codes, output = self.bench.run(operation, self.work, site.size, plan.path, site.victim)
        if not plan.fired():
            return Trial(
                site,
                mode.name,
                "not reached" if codes == [0] * len(codes) else "wrong",
                "" if not any(codes) else _tail(output),
            )
        ended_well = codes == [0] * len(codes)
        problem = self._problem(operation, mode, codes, output, expected if ended_well else None)
        if problem is None and (operation.is_repeatable or not ended_well):
            again, output_again = self.bench.run(operation, self.work, site.size)
            problem = self._problem(operation, None, again, output_again, expected)
            problem = problem and f"given again: {problem}"
        verdict = "wrong" if problem else "survived" if ended_well else "refused"
        return Trial(
            site,
            mode.name,
            verdict,
            f"{problem} | {_tail(output)}"
            if problem
            else _lines(output)[-1][:300]
            if not ended_well and _lines(output)
            else "",
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
            differing = _differing(operation, self.work, expected)
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


def plain(path: str) -> str:
    """A path without what differs at every start: tokens and process ids."""
    path = re.sub(r"(?<=_\d{9}_)[0-9a-f]{8}|[0-9a-f]{32}", "X", path)
    return re.sub(r"(?<=[.\w])\.\d+(?=\.|$)", ".N", path)


def _differing(operation: Operation, work: Path, expected: dict[str, Any]) -> list[str]:
    try:
        found = operation.result(work)
    except Exception as error:  # a result that cannot be read differs
        return [f"{type(error).__name__}: {error}"]
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def _lines(output: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if line.strip()]


def _tail(output: str) -> str:
    return " / ".join(_lines(output)[-4:])[-900:]


# -------------------------------------------------------------------------------------------------- which trials


def all_of(sites: list[Site], visits: int) -> list[tuple[Site, Mode]]:
    """All modes at all calls. Of the calls of one kind on one file, the first `visits` and the last (0: all)."""
    last = {(site.call, site.path): site.visit for site in sites}
    chosen = [site for site in sites if not visits or site.visit <= visits or site.visit == last[site.call, site.path]]
    return [(site, mode) for site in chosen for mode in MODES if mode.applies(site.call)]


def sample(pairs: list[tuple[Site, Mode]], count: int, seed: int) -> list[tuple[Site, Mode]]:
    """`count` of the trials, taken from every mode in turn."""
    chance = random.Random(seed)
    by_mode = {mode.name: [pair for pair in pairs if pair[1] is mode] for mode in MODES}
    for some in by_mode.values():
        chance.shuffle(some)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_mode.values()))
    return list(itertools.islice((pair for pair in turns if pair), count))


def carry_out(bench: Bench, pairs: list[tuple[Site, Mode]], jobs: int, log: Path) -> Iterator[Trial]:
    """Runs the trials, `jobs` at the same time, and writes each to `log`. A trial that is in `log` is not repeated."""
    done = {(trial.site, trial.mode): trial for trial in read_log(log)}
    free = [Sweep(bench, bench.folder / f"work{job}") for job in range(jobs)]

    def one(pair: tuple[Site, Mode]) -> Trial:
        if before := done.get((pair[0], pair[1].name)):
            return before
        sweep = free.pop()
        try:
            trial = sweep.trial(*pair)
        finally:
            free.append(sweep)
        with log.open("a") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        return trial

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, pairs)


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


def keep(results: Path, trials: list[Trial], conditions: dict[str, Any]) -> None:
    """Writes syscalls.json and syscalls.md. Groups (operation, ranks, victim) that were not swept now stay."""
    path = results / "syscalls.json"
    before = json.loads(path.read_text())["trials"] if path.exists() else []
    old = [Trial(Site(**one.pop("site")), **one) for one in before]
    swept = {(trial.site.operation, trial.site.size, trial.site.victim) for trial in trials}
    together = [
        trial for trial in old if (trial.site.operation, trial.site.size, trial.site.victim) not in swept
    ] + trials
    text = [HEADING]
    for operation, size, victim in GROUPS:
        own = [
            trial
            for trial in together
            if (trial.site.operation, trial.site.size, trial.site.victim) == (operation, size, victim)
        ]
        if own:
            counts = Counter(trial.verdict for trial in own)
            output = ", ".join(
                f"{counts[verdict]} {verdict}" for verdict in ("survived", "refused", "wrong", "not reached")
            )
            text += [f"## {operation}, {_who(operation, size, victim)}: {output}", "", table(own)]
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"conditions": conditions, "trials": [asdict(trial) for trial in together]}, indent=0) + "\n"
    )
    (results / "syscalls.md").write_text("\n".join(text))


def _who(operation: str, size: int, victim: int) -> str:
    if operation == "pack":
        return "one process" if size == 1 else f"{size} workers, the fault in a worker"
    return "1 rank" if size == 1 else f"{size} ranks, the fault on rank {victim}"


HEADING = """# System calls that fail

`python tools/torture.py --only syscalls` repeats a save, a resume, a pack and an evaluation for every
call on their files and every way of failing. A cell counts three kinds of trials:

- **survived**: ended well, with the same bits;
- **refused**: ended with one line or was killed, and the same command then ended with the same bits;
- **wrong**: anything else.
"""
