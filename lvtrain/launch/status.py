"""The status of a chain: one line for each phase, from the run folder and, if Slurm can be asked, the queue."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json
from lvtrain.launch.attempt import stopped_path
from lvtrain.launch.chain import Chain, load_chain
from lvtrain.launch.ledger import Ledger, Record
from lvtrain.launch.slurm import QueuedJob, Slurm
from lvtrain.training.heartbeat import read_all
from lvtrain.training.outcome import committed_step


@dataclass(frozen=True)
class PhaseStatus:
    """Status of one phase."""

    phase: str
    state: str  # done, skipped, running, queued, ended, lost, stopped, waiting or unknown
    attempts: int
    fruitless: int  # attempts since the last progress
    steps: str  # from the step at its first start to the last one known
    jobs: str
    note: str


@dataclass(frozen=True)
class ChainStatus:
    """Status of a chain."""

    chain: Chain
    phases: list[PhaseStatus]
    step: int  # of the newest checkpoint
    stopped: str | None  # why, if the chain was stopped
    advice: str | None  # what to do, if nothing continues by itself
    heartbeat: str | None


def chain_status(run_folder: Path, slurm: Slurm) -> ChainStatus:
    """Reads the status of a run's chain. If Slurm does not answer, the run folder alone decides.

    Raises:
        UserError: the run has no chain.
    """
    chain = load_chain(run_folder)
    run_folder, ledger = Path(run_folder), Ledger(chain.folder)
    try:
        queue: list[QueuedJob] | None = slurm.queue(chain.job_name)
    except UserError:
        queue = None
    stopped = _stop_reason(chain)
    step, records = committed_step(run_folder), ledger.this_chain()
    phases = [_phase(chain, phase, ledger, records, queue, step, stopped, slurm) for phase in chain.phases]
    return ChainStatus(chain, phases, step, stopped, _advice(chain, queue, stopped), _heartbeat(run_folder))


def _phase(
    chain: Chain,
    phase: str,
    ledger: Ledger,
    records: list[Record],
    queue: list[QueuedJob] | None,
    step: int,
    stopped: str | None,
    slurm: Slurm,
) -> PhaseStatus:
    mine = [record for record in records if record.get("phase") == phase]
    starts = [record for record in mine if record["event"] == "start"]
    ends = [record for record in mine if record["event"] == "end"]
    jobs = ledger.jobs(phase)
    waiting = {row.job: row for row in queue or [] if row.job in jobs}
    running = [row for row in waiting.values() if row.state in ("RUNNING", "COMPLETING")]
    note = str(ends[-1]["reason"]) if ends else ""
    if chain.is_done(phase):
        state = "done"
        if starts and ends and starts[0]["step"] == ends[-1]["step"] and not _entered(chain, phase):
            state, note = "skipped", "the schedule was complete before this phase"
    elif running:
        state, note = "running", f"on {running[0].nodes}"
    elif waiting:
        row = next(iter(waiting.values()))
        state, note = "queued", f"{row.reason}; {note}" if note else row.reason
    elif stopped is not None and any(record["event"] == "stop" for record in mine):
        state, note = "stopped", stopped
    elif starts and queue is not None:
        state, note = _without_jobs(mine, note, slurm, jobs)
    else:
        state = "waiting" if queue is not None or not starts else "unknown"
    last = ends[-1]["step"] if state == "done" and ends else step
    trained = starts and state != "skipped"
    return PhaseStatus(
        phase=phase,
        state=state,
        attempts=len(starts),
        fruitless=0 if state in ("done", "skipped") else ledger.fruitless(phase, step),
        steps=f"{starts[0]['step']} to {last}" if trained else "",
        jobs=" ".join(map(str, waiting or jobs[-1:])),
        note=note,
    )


def _without_jobs(mine: list[Record], note: str, slurm: Slurm, jobs: list[int]) -> tuple[str, str]:
    """State and note of a phase that was started and has no job: `ended` by Slurm or a user, or `lost` without a trace."""
    try:
        last = slurm.job(jobs[-1]).state if jobs else ""
    except UserError:  # Slurm forgets a job after some minutes
        last = ""
    if last in ("CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL"):
        return "ended", f"Slurm: {last}; {note}" if note else f"Slurm: {last}"
    return ("ended" if mine[-1]["event"] == "ended" else "lost"), note


def _entered(chain: Chain, phase: str) -> bool:
    """Whether the trainer ever began the phase, according to its `events.jsonl`."""
    try:
        with (Path(chain.run_folder) / "events.jsonl").open() as file:
            return any('"event": "phase_start"' in line and f'"phase": "{phase}"' in line for line in file)
    except OSError:
        return False


def _stop_reason(chain: Chain) -> str | None:
    try:
        record: dict[str, Any] = parse_json(stopped_path(chain).read_text())
    except (OSError, ValueError):
        return None
    return str(record.get("reason", "no reason written"))


def _advice(chain: Chain, queue: list[QueuedJob] | None, stopped: str | None) -> str | None:
    if chain.first_open_phase() is None:
        return f"all phases are done; report: python tools/report.py {chain.run_folder}"
    if stopped is not None:
        return "fix the reason, then submit the same script again: it resumes from the last checkpoint"
    if queue is None:
        return "Slurm does not answer here; this is from the run folder only"
    if not queue:
        return "no job is left in the queue (cancelled, or a time limit in requeue mode); submit the same script again to resume"
    return None


def _heartbeat(run_folder: Path) -> str | None:
    beats = read_all(run_folder / "heartbeat")
    if not beats:
        return None
    slowest = min(beats, key=lambda beat: (beat.step, beat.since))
    return (
        f"{len(beats)} ranks; the one furthest behind is rank {slowest.rank} on {slowest.host}, "
        f"{time.time() - slowest.since:.0f} s in {slowest.doing!r} of step {slowest.step}"
    )
