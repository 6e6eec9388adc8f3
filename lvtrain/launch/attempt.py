"""One job's attempt at a phase: run the tasks, look at how they ended, carry out the decision.

It runs in the batch script, on the job's first node, outside any container. It needs only the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lvtrain.errors import EXIT_DONE, EXIT_STOPPED, UserError
from lvtrain.launch import decide as decisions
from lvtrain.launch.chain import Chain, load_chain
from lvtrain.launch.decide import MAX_FRUITLESS, AttemptResult, Decision, Finish, Retry, Stop
from lvtrain.launch.ledger import Ledger
from lvtrain.launch.slurm import Slurm
from lvtrain.launch.tasks import run_tasks, srun_command, task_environment
from lvtrain.training import outcome as outcomes

EXIT_CHAIN_STOPPED = 1
Tasks = Callable[[list[str], dict[str, str], Callable[[], None]], tuple[int, str]]


class Attempt:
    """`Attempt(run_folder, phase).run()` returns the batch script's exit code."""

    def __init__(
        self,
        run_folder: Path,
        phase: str,
        *,
        slurm: Slurm | None = None,
        tasks: Tasks = run_tasks,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.chain: Chain = load_chain(run_folder)
        self.phase, self.run_folder = phase, Path(run_folder)
        self.slurm, self.tasks, self.clock, self.pause = slurm or Slurm(), tasks, clock, pause
        self.ledger = Ledger(self.chain.folder, clock)
        self.job, self.nodes = int(environment["SLURM_JOB_ID"]), environment.get("SLURM_JOB_NODELIST", "")
        self.restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
        self.continued = False  # another job already waits to take over

    def run(self) -> int:
        if stopped_path(self.chain).exists():
            say(f"the chain was stopped before this job: see {stopped_path(self.chain)}")
            return EXIT_CHAIN_STOPPED
        try:
            decision = self.refuse_or_finish() or self.train()
        except UserError as error:  # Slurm has not answered for a minute
            decision = Stop(f"job {self.job} could not start phase {self.phase}: {error}")
        return self.act(decision)

    def refuse_or_finish(self) -> Decision | None:
        """Decides what is known before anything is started; None: start the tasks."""
        if self.chain.is_done(self.phase):
            return Finish(f"phase {self.phase} was done before this job")
        earlier = self.chain.first_open_phase()
        if earlier != self.phase:
            return Stop(f"phase {self.phase} cannot start: phase {earlier} is not done and has no jobs left")
        step = outcomes.committed_step(self.run_folder)
        fruitless = self.ledger.fruitless(self.phase, step)
        if fruitless >= MAX_FRUITLESS:
            return Stop(
                f"{fruitless} attempts at phase {self.phase} made no progress past step {step}; the last one left no reason"
            )
        return None

    def train(self) -> Decision:
        """Starts the tasks, waits for them, and decides what comes next."""
        step, attempt = outcomes.committed_step(self.run_folder), self.ledger.next_attempt()
        outcomes.path_in(self.run_folder).unlink(missing_ok=True)
        where = {"attempt": attempt, "job": self.job, "phase": self.phase}
        self.ledger.add("start", **where, restart=self.restart, step=step, nodes=self.nodes)
        command = srun_command(self.chain, self.phase, self.minutes_left())
        environment = task_environment(self.slurm.first_address(self.nodes))
        code, messages = self.tasks(command, environment, self.interrupted)
        after, found = outcomes.committed_step(self.run_folder), outcomes.read(self.run_folder)
        # a node that ends first with exit code 75 was asked to stop, so it is not blamed
        suspect = decisions.suspect_node(messages) if found is None else None
        if found is not None and found.outcome == "done":
            self.chain.mark_done(self.phase, found)
        decision = decisions.decide(
            AttemptResult(
                phase=self.phase,
                phase_done=self.chain.is_done(self.phase),
                outcome=found,
                exit_code=code,
                step_before=step,
                step_after=after,
                fruitless=self.ledger.fruitless(self.phase, after),
                first_hold_seconds=self.chain.site.hold_seconds,
                suspects=(*self.ledger.suspects(self.phase), suspect),
            )
        )
        ended = {"outcome": found.outcome if found else "none", "exit_code": code, "suspect": suspect}
        self.ledger.add("end", **where, step=after, **ended, decision=decision.kind, reason=decision.reason)
        return decision

    def minutes_left(self) -> float | None:
        """Minutes until the time limit, less what starting the tasks may take (a tenth, at most two minutes)."""
        end = self.slurm.job(self.job).end
        if end is None:
            return None
        left = end - self.clock()
        return max(0.0, left - min(120.0, 0.1 * left)) / 60

    def interrupted(self) -> None:
        """Called when SIGTERM reaches the batch script. Submits the next job if the time limit is why.

        After the time limit Slurm never starts this job again.
        """
        if not self.chain.site.links and self.fate() == "timeout":
            self.resubmit(f"time limit of job {self.job}")

    def fate(self) -> decisions.JobFate:
        try:
            info = self.slurm.job(self.job)
        except UserError:
            return "not ours"
        return decisions.fate(info.state, info.reason)

    # ------------------------------------------------------------------------------------------------- carrying it out

    def act(self, decision: Decision) -> int:
        if isinstance(decision, Finish):
            return self.finish(decision)
        if isinstance(decision, Retry):
            return self.go_on(decision)
        return self.stop(decision.reason)

    def stop(self, reason: str) -> int:
        """Ends the chain: writes and prints the reason once, and cancels the jobs that still wait. Returns the exit code."""
        try:
            with stopped_path(self.chain).open("x") as file:
                json.dump(self.ledger.add("stop", job=self.job, phase=self.phase, reason=reason), file)
                file.write("\n")
        except FileExistsError:
            return EXIT_CHAIN_STOPPED
        say(f"chain stopped: {reason}")
        try:
            self.slurm.cancel([row.job for row in self.slurm.queue(self.chain.job_name) if row.job != self.job])
        except UserError as error:
            say(f"{error}; the jobs that wait will see that the chain is stopped, and end")
        return EXIT_CHAIN_STOPPED

    def finish(self, decision: Finish) -> int:
        say(decision.reason)
        following = self.chain.next_phase(self.phase)
        if self.chain.site.links:
            # the other links of this phase would wait for a whole allocation only to find nothing to do
            self.slurm.cancel(self.waiting(self.phase))
        elif following is not None and not self.waiting(following):
            try:
                submit_phase(self.chain, self.ledger, self.slurm, following, f"--dependency=afterany:{self.job}")
            except UserError as error:
                return self.stop(f"phase {following} could not be submitted: {error}")
        if following is None:
            say(f"all phases of {self.chain.run_folder} are done")
        return EXIT_DONE

    def go_on(self, decision: Retry) -> int:
        fate = self.fate()
        if fate == "not ours":
            self.ledger.add("ended", job=self.job, phase=self.phase)
            say(f"{decision.reason}; Slurm or a user ended the job, so it is not started again here")
            return EXIT_STOPPED
        if self.chain.site.links:
            return self.leave_to_next_link(decision)
        if not self.continued:
            refused = "it hit its time limit" if fate == "timeout" else None
            if decision.hold_seconds == 0 and refused is None:
                say(f"{decision.reason}; requeued")
                refused = self.slurm.requeue(self.job)
                if refused is None:
                    self.pause(600)  # the requeue ends this script
                    return EXIT_STOPPED
            self.resubmit(decision.reason, decision.hold_seconds, decision.exclude)
        return EXIT_STOPPED

    def leave_to_next_link(self, decision: Retry) -> int:
        links = self.waiting(self.phase)
        if not links:
            return self.stop(
                f"phase {self.phase} is not done after its {self.chain.site.links} links; {decision.reason}"
            )
        if decision.hold_seconds:
            self.slurm.postpone(links[0], decision.hold_seconds, decision.exclude)
        say(f"{decision.reason}; {len(links)} links left, next is job {links[0]}")
        return EXIT_STOPPED

    def resubmit(self, reason: str, hold_seconds: int = 0, exclude: tuple[str, ...] = ()) -> None:
        """Submits a new job for the phase, where a requeue is not possible or would come too soon."""
        if self.continued:
            return
        self.continued = True
        options = [f"--dependency=afterany:{self.job}", *([f"--begin=now+{hold_seconds}"] if hold_seconds else [])]
        without = [f"--exclude={','.join(exclude)}"] if exclude else []
        try:
            try:
                job = submit_phase(self.chain, self.ledger, self.slurm, self.phase, *options, *without)
            except UserError:
                if not without:
                    raise
                # a small partition cannot do without the blamed node: try with it
                job = submit_phase(self.chain, self.ledger, self.slurm, self.phase, *options)
        except UserError as error:
            self.stop(f"{reason}; the job to take over could not be submitted: {error}")
            return
        say(f"{reason}; job {job} takes over" + (f" in {hold_seconds} s" if hold_seconds else ""))

    def waiting(self, phase: str) -> list[int]:
        """Other jobs of this chain for a phase that are still in the queue."""
        try:
            queued = {row.job for row in self.slurm.queue(self.chain.job_name)}
        except UserError as error:
            say(f"{error}; using the ledger only")
            return []
        return [job for job in self.ledger.jobs(phase) if job in queued and job != self.job]


def submit_phase(chain: Chain, ledger: Ledger, slurm: Slurm, phase: str, *options: str) -> int:
    """Submits a phase's script with these sbatch options, and records it. Returns the job's id."""
    job = slurm.submit(chain.script(phase), *options)
    ledger.add("submit", job=job, phase=phase, options=list(options))
    return job


def stopped_path(chain: Chain) -> Path:
    """The file that says why a chain was stopped."""
    return chain.folder / "stopped.json"


def say(text: str) -> None:
    """Prints one line on standard error."""
    sys.stderr.write(f"lvtrain: {text}\n")
    sys.stderr.flush()
