"""The chain's decisions, scripts and ledger, with a stand-in for Slurm's commands, a fake clock and scripted tasks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvtrain.errors import UserError
from lvtrain.launch.attempt import Attempt
from lvtrain.launch.chain import Chain, load_chain
from lvtrain.launch.decide import AttemptResult, Decision, Finish, Retry, Stop, decide, fate, suspect_node
from lvtrain.launch.ledger import Ledger
from lvtrain.launch.script import sbatch_text
from lvtrain.launch.site import Site, read_site
from lvtrain.launch.slurm import Slurm, clean_environment, run_command
from lvtrain.launch.status import chain_status
from lvtrain.launch.submit import plan_chain, submit_chain
from lvtrain.launch.tasks import srun_command
from lvtrain.training import outcome
from lvtrain.training.outcome import Outcome

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("alignment", "stabilisation", "refinement")


class FakeSlurm:
    """Answers as Slurm 22.05 does; holds jobs by id, with their options."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.queued: dict[int, str] = {}
        self.names: dict[int, str] = {}  # of jobs whose script is there to be read
        self.refuse: Callable[[list[str]], bool] = lambda command: False
        self.state = "JobState=RUNNING Reason=None EndTime=1970-01-02T00:00:00"
        self.next_id = 100

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.refuse(command):
            return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: error: not today\n")
        return subprocess.CompletedProcess(command, 0, self.answer(command), "")

    def answer(self, command: list[str]) -> str:
        if command[0] == "sbatch":
            self.next_id += 1
            self.queued[self.next_id] = "PENDING"
            if (script := Path(command[-1])).exists():
                self.names[self.next_id] = re.findall(r"--job-name=(\S+)", script.read_text())[0]
            return f"{self.next_id};cluster\n"
        if command[0] == "squeue":
            asked = next(word.removeprefix("--name=") for word in command if word.startswith("--name="))
            return "".join(
                f"{job}|{state}|None|\n" for job, state in self.queued.items() if self.names.get(job, asked) == asked
            )
        if command[0] == "scancel":
            for job in command[1:]:
                del self.queued[int(job)]
        if command[:3] == ["scontrol", "show", "job"]:
            return f"JobId={command[-1]} {self.state}"
        if command[:3] == ["scontrol", "show", "hostnames"]:
            return "gpu003\ngpu004\n"
        if command[:3] == ["scontrol", "show", "node"]:
            return "NodeName=gpu003 NodeAddr=10.0.0.3 NodeHostName=gpu003"
        return ""

    def sent(self, program: str) -> list[list[str]]:
        return [command for command in self.commands if command[0] == program and command[1] != "show"]


class World:
    """A chain in a folder, its Slurm, its clock, and tasks that do what the test says."""

    def __init__(self, folder: Path, **site: Any) -> None:
        self.slurm, self.now = FakeSlurm(), 1000.0
        settings = Site(nodes=2, gpus_per_node=4, launch_python="python3", **site)
        self.chain = Chain("toy", "/home", str(folder), PHASES, "toy.yaml", "zero.json", ("a.b=1",), settings)
        self.chain.save()
        self.ledger = Ledger(self.chain.folder, lambda: self.now)
        self.ledger.add("chain", mode=settings.chain)
        self.folder = folder
        self.task_commands: list[list[str]] = []
        self.paused: list[float] = []

    def commit(self, step: int) -> None:
        (self.folder / "checkpoints" / f"step_{step:09d}").mkdir(parents=True, exist_ok=True)
        (self.folder / "checkpoints" / f"step_{step:09d}" / "manifest.json").touch()

    def attempt(self, phase: str, ends: Callable[[], tuple[int, str]], *, job: int = 7, restart: int = 0) -> int:
        def tasks(command: list[str], environment: dict[str, str], interrupted: Callable[[], None]) -> tuple[int, str]:
            self.task_commands.append(command)
            self.environment, self.interrupted = environment, interrupted
            self.now += 60
            return ends()

        started = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "gpu[003-004]", "SLURM_RESTART_COUNT": str(restart)}
        return Attempt(
            self.folder,
            phase,
            slurm=Slurm(self.slurm),
            tasks=tasks,
            clock=lambda: self.now,
            pause=self.paused.append,
            environment=started,
        ).run()

    def ends(
        self, verdict: outcome.Verdict | None, step: int, code: int = 0, messages: str = ""
    ) -> Callable[[], tuple[int, str]]:
        def end() -> tuple[int, str]:
            if step:
                self.commit(step)
            if verdict is not None:
                outcome.write(self.folder, Outcome(verdict, "alignment", step, "because", 1))
            return code, messages

        return end

    def stopped(self) -> dict[str, Any] | None:
        path = self.chain.folder / "stopped.json"
        return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def links(tmp_path: Path) -> World:
    """Singleton mode with two links a phase in the queue: jobs 101, 102 for alignment, and so on; this job is 101."""
    world = World(tmp_path, chain="singleton:2")
    for phase in PHASES:
        for _ in range(2):
            job = Slurm(world.slurm).submit(world.chain.script(phase))
            world.ledger.add("submit", job=job, phase=phase)
    world.slurm.commands.clear()
    return world


# ------------------------------------------------------------------------------------------------------- decisions

BASE = AttemptResult("alignment", False, None, 1, step_before=100, step_after=200, fruitless=0)


def outcome_of(verdict: outcome.Verdict) -> Outcome:
    return Outcome(verdict, "alignment", 200, "because", 1)


@pytest.mark.parametrize(
    ("ended", "expected", "named"),
    [
        (replace(BASE, phase_done=True), Finish(""), ["alignment", "200"]),
        # done is done, even if a rank crashed at exit
        (replace(BASE, phase_done=True, exit_code=139), Finish(""), ["alignment", "200"]),
        (replace(BASE, outcome=outcome_of("requeue"), exit_code=75), Retry(""), ["because", "200"]),
        (replace(BASE, outcome=outcome_of("fatal"), exit_code=2), Stop(""), ["alignment", "200", "because"]),
        (replace(BASE, exit_code=137), Retry(""), ["137", "200"]),
        (replace(BASE, exit_code=2), Stop(""), ["alignment", "exit code 2"]),
        (replace(BASE, step_after=100, fruitless=1), Retry("", hold_seconds=60), ["exit code 1", "100"]),
        (
            replace(BASE, step_after=100, fruitless=2, suspects=("n7", "n7")),
            Retry("", hold_seconds=120, exclude=("n7",)),
            ["exit code 1", "100"],
        ),
        (
            replace(BASE, step_after=100, fruitless=2, suspects=("n7", "n8")),
            Retry("", hold_seconds=120),
            ["exit code 1", "100"],
        ),
        (replace(BASE, step_after=100, fruitless=3), Stop(""), ["3 attempts", "alignment", "100", "exit code 1"]),
        (
            replace(BASE, outcome=outcome_of("requeue"), step_after=100, fruitless=3),
            Stop(""),
            ["3 attempts", "alignment", "100", "because"],
        ),
    ],
)
def test_decisions(ended: AttemptResult, expected: Decision, named: list[str]) -> None:
    decision = decide(ended)
    assert replace(decision, reason="") == expected
    assert all(part in decision.reason for part in named), decision.reason


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_any_history_ends_within_three_attempts_without_progress(gains: list[int]) -> None:
    """Attempts that crash after gaining so many steps: never more than three in a row without a gain."""
    starts: list[int] = []
    step = 0
    for gain in gains:
        starts.append(step)
        before, step = step, step + gain
        fruitless = sum(start >= step for start in starts)
        decision = decide(AttemptResult("p", False, None, 1, before, step, fruitless))
        if isinstance(decision, Stop):
            assert starts[-3:] == [step] * 3
            return
        assert starts[-3:] != [step] * 3


def test_srun_names_the_node_that_failed_first() -> None:
    said = "srun: error: gpu07: task 3: Segmentation fault\nsrun: error: gpu04: tasks 0-1: Terminated\n"
    assert suspect_node(said) == "gpu07"
    assert suspect_node("srun: error: gpu[04-07]: tasks 0-3: Exited with exit code 1\n") is None
    assert suspect_node("srun: launch/slurm: _step_signal: Terminating StepId=7.0\n") is None


def test_who_decides_about_a_job() -> None:
    assert fate("RUNNING", "None") == "ours"
    assert fate("COMPLETING", "TimeLimit") == fate("TIMEOUT", "TimeLimit") == "timeout"
    assert fate("COMPLETING", "None") == fate("CANCELLED", "None") == fate("PENDING", "BeginTime") == "not ours"


# ----------------------------------------------------------------------------------------------- one job's attempt


def test_a_finished_phase_submits_the_next(world: World) -> None:
    assert world.attempt("alignment", world.ends("done", 500)) == 0
    script = str(world.chain.script("stabilisation"))
    assert world.slurm.sent("sbatch") == [["sbatch", "--parsable", "--dependency=afterany:7", script]]
    # the job is started again by accident (its node fell after the end): nothing is trained, nothing submitted twice
    assert world.attempt("alignment", world.ends("fatal", 500), restart=1) == 0
    assert len(world.slurm.sent("sbatch")) == 1 and len(world.task_commands) == 1


def test_the_last_phase_submits_nothing(world: World) -> None:
    for phase in PHASES:
        assert world.attempt(phase, world.ends("done", 500)) == 0
        world.slurm.queued.clear()
    assert len(world.slurm.sent("sbatch")) == 2 and world.stopped() is None


def test_tasks_know_where_to_meet_and_when_to_stop(world: World) -> None:
    world.slurm.state = "JobState=RUNNING Reason=None EndTime=1970-01-01T01:00:00"
    world.now = world_end = 0.0
    from datetime import datetime

    world_end = datetime.fromisoformat("1970-01-01T01:00:00").timestamp()
    world.now = world_end - 3600
    world.attempt("alignment", world.ends("done", 5))
    assert world.environment["MASTER_ADDR"] == "10.0.0.3"
    command = world.task_commands[0]
    assert command[:2] == ["srun", "--kill-on-bad-exit=1"] and "--ntasks=8" in command
    assert command[command.index("--max-time") + 1] == "58.00"  # an hour less two minutes for starting
    assert command[-1] == "a.b=1" and command[command.index("--phase") + 1] == "alignment"


def test_stopped_early_is_requeued_under_the_same_job(world: World) -> None:
    assert world.attempt("alignment", world.ends("requeue", 40, code=75)) == 75
    assert world.slurm.sent("scontrol") == [["scontrol", "requeue", "7"]]
    assert world.paused and not world.slurm.sent("sbatch")


def test_where_requeuing_is_refused_a_new_job_takes_over(world: World) -> None:
    world.slurm.refuse = lambda command: command[:2] == ["scontrol", "requeue"]
    assert world.attempt("alignment", world.ends("requeue", 40, code=75)) == 75
    assert world.slurm.sent("sbatch")[0][2:] == ["--dependency=afterany:7", str(world.chain.script("alignment"))]


def test_a_crash_without_progress_waits_leaves_the_node_out_and_ends_after_three(world: World) -> None:
    crash = world.ends(None, 0, code=137, messages="srun: error: gpu04: task 3: Killed\n")
    codes = [world.attempt("alignment", crash, job=job) for job in (7, 8, 9)]
    assert codes == [75, 75, 1]
    first, second = (command[2:-1] for command in world.slurm.sent("sbatch"))
    assert first == ["--dependency=afterany:7", "--begin=now+60"]
    assert second == ["--dependency=afterany:8", "--begin=now+120", "--exclude=gpu04"]
    stopped = world.stopped()
    assert stopped is not None
    assert all(part in stopped["reason"] for part in ("3 attempts", "alignment", "step 0", "137"))
    assert not world.slurm.queued  # dependents are cancelled


def test_a_node_that_only_stopped_first_is_not_blamed(world: World) -> None:
    said = "srun: error: gpu04: task 3: Exited with exit code 75\n"
    assert world.attempt("alignment", world.ends("requeue", 0, code=75, messages=said)) == 75
    crash = world.ends(None, 0, code=137, messages="srun: error: gpu04: task 3: Killed\n")
    assert world.attempt("alignment", crash) == 75
    assert not [word for word in world.slurm.sent("sbatch")[-1] if word.startswith("--exclude")]


def test_a_cluster_that_cannot_spare_the_node_gets_the_job_without_exclusion(world: World) -> None:
    world.slurm.refuse = lambda command: any(word.startswith("--exclude") for word in command)
    crash = world.ends(None, 0, code=137, messages="srun: error: gpu04: task 3: Killed\n")
    assert [world.attempt("alignment", crash, job=job) for job in (7, 8)] == [75, 75]
    assert world.slurm.sent("sbatch")[-1][2:-1] == ["--dependency=afterany:8", "--begin=now+120"]
    assert world.stopped() is None


def test_progress_starts_the_counting_anew(world: World) -> None:
    steps = (0, 0, 40, 40, 40)
    codes = [world.attempt("alignment", world.ends(None, step, code=1), job=7 + n) for n, step in enumerate(steps)]
    assert codes == [75, 75, 75, 75, 75] and world.stopped() is None
    assert world.attempt("alignment", world.ends(None, 40, code=1), job=20) == 1


def test_jobs_that_die_suddenly_count_too(world: World) -> None:
    """Node failures and time limits leave a start without an end."""

    def dies() -> tuple[int, str]:
        raise KeyboardInterrupt

    for restart in range(3):
        with pytest.raises(KeyboardInterrupt):
            world.attempt("alignment", dies, restart=restart)
    assert world.attempt("alignment", world.ends("done", 50), restart=3) == 1
    stopped = world.stopped()
    assert stopped is not None and "3 attempts at phase alignment" in stopped["reason"]


def test_an_error_stops_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.attempt("alignment", world.ends("fatal", 40, code=2)) == 1
    assert world.attempt("alignment", world.ends("done", 50)) == 1  # a job that was on its way
    said = capsys.readouterr().err
    assert said.count("because") == 1 and "alignment" in said and "40" in said
    assert len(world.task_commands) == 1 and len([r for r in world.ledger.read() if r["event"] == "stop"]) == 1


def test_a_cancelled_job_is_left_alone(world: World) -> None:
    world.slurm.state = "JobState=COMPLETING Reason=None EndTime=Unknown"
    assert world.attempt("alignment", world.ends("requeue", 40, code=75)) == 75
    assert not world.slurm.sent("scontrol") and not world.slurm.sent("sbatch")


def test_at_the_time_limit_a_new_job_is_submitted_at_once_and_only_once(world: World) -> None:
    def limit() -> tuple[int, str]:
        world.slurm.state = "JobState=COMPLETING Reason=TimeLimit EndTime=Unknown"
        world.interrupted()
        assert len(world.slurm.sent("sbatch")) == 1  # the tasks are not waited for
        return world.ends("requeue", 40, code=75)()

    assert world.attempt("alignment", limit) == 75
    assert len(world.slurm.sent("sbatch")) == 1 and not world.slurm.sent("scontrol")


def test_pre_emption_is_not_taken_for_the_time_limit(world: World) -> None:
    def evicted() -> tuple[int, str]:
        world.interrupted()
        return world.ends("requeue", 40, code=75)()

    assert world.attempt("alignment", evicted) == 75
    assert not world.slurm.sent("sbatch") and world.slurm.sent("scontrol") == [["scontrol", "requeue", "7"]]


def test_the_next_phase_that_cannot_be_submitted_stops_the_chain(world: World) -> None:
    world.slurm.refuse = lambda command: command[0] == "sbatch"
    assert world.attempt("alignment", world.ends("done", 40)) == 1
    stopped = world.stopped()
    assert stopped is not None and "sbatch: error: not today" in stopped["reason"]


def test_a_slurm_that_cannot_be_asked_stops_the_chain(world: World) -> None:
    world.slurm.refuse = lambda command: command[:3] == ["scontrol", "show", "job"]
    assert world.attempt("alignment", world.ends("done", 40)) == 1
    stopped = world.stopped()
    assert stopped is not None and all(part in stopped["reason"] for part in ("job 7", "alignment", "scontrol"))


def test_a_link_leaves_the_rest_to_the_next(links: World) -> None:
    links.slurm.queued[101] = "RUNNING"
    assert links.attempt("alignment", links.ends("requeue", 40, code=75), job=101) == 75
    assert not links.slurm.sent("sbatch") and not links.slurm.sent("scontrol") and len(links.slurm.queued) == 6


def test_a_link_that_finishes_cancels_the_spare_ones(links: World) -> None:
    links.slurm.queued[101] = "RUNNING"
    assert links.attempt("alignment", links.ends("done", 40), job=101) == 0
    assert links.slurm.sent("scancel") == [["scancel", "102"]] and not links.slurm.sent("sbatch")


def test_a_link_that_crashes_without_progress_postpones_the_next(links: World) -> None:
    links.slurm.queued[101] = "RUNNING"
    assert links.attempt("alignment", links.ends(None, 0, code=1), job=101) == 75
    assert links.slurm.sent("scontrol") == [["scontrol", "update", "JobId=102", "StartTime=now+60"]]


def test_the_last_link_stops_the_chain(links: World) -> None:
    del links.slurm.queued[101]
    assert links.attempt("alignment", links.ends("requeue", 40, code=75), job=102) == 1
    stopped = links.stopped()
    assert stopped is not None and all(part in stopped["reason"] for part in ("alignment", "2 links"))
    assert set(links.slurm.queued) == {102}


def test_links_of_a_later_phase_see_that_the_earlier_one_died(links: World) -> None:
    assert links.attempt("stabilisation", links.ends("done", 40), job=103) == 1
    stopped = links.stopped()
    assert stopped is not None and "alignment" in stopped["reason"]
    assert not links.task_commands


# ------------------------------------------------------------------------------------------------ scripts and settings


def test_the_whole_sbatch_script() -> None:
    site = Site(
        partition="gpu",
        account="faces",
        nodes=8,
        gpus_per_node=8,
        cpus_per_task=12,
        memory="0",
        time="24:00:00",
        sbatch="--constraint=h200 --mail-type=FAIL",
        srun="--container-image=lvtrain.sqsh",
        container="numactl --localalloc",
        python="python3",
        launch_python="/opt/py/bin/python",
        modules="cuda/13.0",
        setup="/etc/faces.sh",
    )
    chain = Chain("pco_vitl", "/src", "/scratch/my runs/pco_vitl", PHASES, "r.yaml", "z.json", ("seed=1",), site)
    assert (
        sbatch_text(chain, "refinement")
        == """\
#!/bin/bash
#SBATCH --job-name=lvtrain-pco_vitl-442ec3
#SBATCH --comment="phase refinement of /scratch/my runs/pco_vitl"
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --partition=gpu
#SBATCH --account=faces
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --open-mode=append
#SBATCH --output="/scratch/my runs/pco_vitl/slurm/refinement-%j.log"
#SBATCH --chdir=/src
#SBATCH --constraint=h200
#SBATCH --mail-type=FAIL
# Written by lvtrain.launch at submission. To change it, change slurm/site.env and submit again.
if [ -f slurm/site.env ]; then set -a; . slurm/site.env; set +a; fi
module load cuda/13.0
. /etc/faces.sh
exec /opt/py/bin/python -m lvtrain.launch attempt '/scratch/my runs/pco_vitl' refinement
"""
    )
    assert " ".join(srun_command(chain, "refinement", 1438.0)) == (
        "srun --kill-on-bad-exit=1 --nodes=8 --ntasks=64 --ntasks-per-node=8 --cpus-per-task=12 "
        "--container-image=lvtrain.sqsh numactl --localalloc python3 lvtrain/main.py --recipe r.yaml --ds_config z.json "
        "--phase refinement --max-time 1438.00 seed=1"
    )


def test_links_are_not_requeued() -> None:
    chain = Chain("x", "/src", "/runs/x", PHASES, "r.yaml", "z.json", (), Site(chain="singleton:3", gpus_per_node=0))
    text = sbatch_text(chain, "alignment")
    assert "#SBATCH --no-requeue\n" in text and "gpus" not in text and "module load" not in text


def test_a_chain_survives_its_file(world: World) -> None:
    assert load_chain(world.folder) == world.chain
    with pytest.raises(UserError, match="has no Slurm chain"):
        load_chain(world.folder / "elsewhere")
    (world.chain.folder / "chain.json").write_text('{"name": "x"')
    with pytest.raises(UserError, match=r"chain\.json"):
        load_chain(world.folder)


def test_settings_come_from_variables() -> None:
    site = read_site(
        {"LVTRAIN_NODES": "4", "LVTRAIN_CHAIN": "singleton:12", "SLURM_JOB_ACCOUNT": "mine", "LVTRAIN_PARTITION": "big"}
    )
    assert (site.nodes, site.links, site.ranks, site.account, site.partition) == (4, 12, 32, "mine", "big")
    assert read_site({}).links == 0


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("NODES", "four", "LVTRAIN_NODES is 'four'"),
        ("NODES", "0", "LVTRAIN_NODES is 0"),
        ("CHAIN", "singleton", "LVTRAIN_CHAIN is 'singleton'"),
        ("SBATCH", "--comment='open", "LVTRAIN_SBATCH is"),
    ],
)
def test_wrong_settings_are_named(variable: str, value: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        read_site({f"LVTRAIN_{variable}": value})


def test_a_job_submits_without_its_own_variables() -> None:
    inside = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n0", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "mine", "HOME": "/h"}
    assert clean_environment(inside) == {"SLURM_CONF": "/c", "SBATCH_ACCOUNT": "mine", "HOME": "/h"}


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A submission is repeated only when it cannot have arrived."""
    for program, message in [
        ("squeue", "Socket timed out"),
        ("sbatch", "Socket timed out"),
        ("scontrol", "Unable to contact slurm controller"),
    ]:
        script = tmp_path / program
        script.write_text(
            f"#!/bin/sh\necho x >> {tmp_path}/{program}.calls\n[ $(wc -l < {tmp_path}/{program}.calls) -gt 2 ] && exit 0\necho '{message}' >&2\nexit 1\n"
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    waits: list[float] = []
    assert run_command(["squeue"], pause=waits.append).returncode == 0 and waits == [5, 10]
    assert run_command(["scontrol"], pause=waits.append).returncode == 0 and waits == [5, 10, 5, 10]
    assert run_command(["sbatch"], pause=waits.append).returncode == 1 and len(waits) == 4
    with pytest.raises(UserError, match="snodes"):
        run_command(["snodes"])


# -------------------------------------------------------------------------------------------------------------- status


def queued(world: World, **jobs: str) -> None:
    world.slurm.queued = {int(job.removeprefix("j")): state for job, state in jobs.items()}


def test_status_of_a_chain(world: World) -> None:
    """Running, queued, waiting; then stopped with its reason."""
    world.ledger.add("submit", job=7, phase="alignment")
    queued(world, j7="RUNNING")
    world.attempt("alignment", world.ends("requeue", 40, code=75))
    status = chain_status(world.folder, Slurm(world.slurm))
    assert [(p.phase, p.state, p.attempts) for p in status.phases] == [
        ("alignment", "running", 1),
        ("stabilisation", "waiting", 0),
        ("refinement", "waiting", 0),
    ]
    assert status.step == 40 and status.stopped is None and status.advice is None
    queued(world, j7="PENDING")
    assert chain_status(world.folder, Slurm(world.slurm)).phases[0].state == "queued"
    world.attempt("alignment", world.ends("done", 60), restart=1)
    world.slurm.queued.pop(7)
    status = chain_status(world.folder, Slurm(world.slurm))
    assert [(p.state, p.steps, p.jobs) for p in status.phases] == [
        ("done", "0 to 60", "7"),
        ("queued", "", "101"),
        ("waiting", "", ""),
    ]
    world.attempt("stabilisation", world.ends("fatal", 70, code=2), job=101)
    world.slurm.queued.clear()
    status = chain_status(world.folder, Slurm(world.slurm))
    assert [p.state for p in status.phases] == ["done", "stopped", "waiting"]
    assert status.advice
    assert all(part in str(status.stopped) for part in ("stabilisation", "70", "because"))
    events = world.folder / "events.jsonl"
    events.write_text("")
    world.chain.mark_done("refinement", Outcome("done", "refinement", 60, "the schedule is complete", 1))
    world.ledger.add("start", attempt=3, job=103, phase="refinement", restart=0, step=60, nodes="n1")
    world.ledger.add(
        "end", attempt=3, job=103, phase="refinement", step=60, reason="phase refinement is done at step 60"
    )
    skipped = chain_status(world.folder, Slurm(world.slurm)).phases[2]
    assert (skipped.state, skipped.steps) == ("skipped", "")
    events.write_text('{"time": 1.0, "event": "phase_start", "step": 60, "phase": "refinement"}\n')
    assert chain_status(world.folder, Slurm(world.slurm)).phases[2].state == "done", (
        "trained by an attempt before these"
    )


def test_status_of_a_cancelled_chain_has_advice(world: World) -> None:
    world.ledger.add("submit", job=7, phase="alignment")
    world.slurm.state = "JobState=COMPLETING Reason=None EndTime=Unknown"
    world.attempt("alignment", world.ends("requeue", 40, code=75))
    status = chain_status(world.folder, Slurm(world.slurm))
    assert status.phases[0].state == "ended" and status.advice
    world.slurm.state = "JobState=CANCELLED Reason=None EndTime=Unknown"
    assert chain_status(world.folder, Slurm(world.slurm)).phases[0].note.startswith("Slurm: CANCELLED")
    world.slurm.refuse = lambda command: command[0] == "squeue"
    status = chain_status(world.folder, Slurm(world.slurm))
    assert status.phases[0].state == "unknown" and "Slurm" in str(status.advice)


# ---------------------------------------------------------------------------------------------------------- submission

RECIPE = """
name: toy
data: {path: none}
method: {name: pco}
phases:
  - {name: alignment, global_batch: 24, micro_batches: 12}
  - {name: refinement, global_batch: 24, micro_batches: 12}
schedule: {total: 10 steps}
"""
ZERO = '{"zero_optimization": {"stage": 2}}'


def send(home: Path, slurm: FakeSlurm, **site: Any) -> tuple[Chain, list[int]]:
    (home / "toy.yaml").write_text(RECIPE)
    (home / "zero.json").write_text(ZERO)
    settings = Site(**{"nodes": 3, "gpus_per_node": 4, **site})
    return submit_chain("toy.yaml", "zero.json", ["seed=3"], settings, home=home, slurm=Slurm(slurm))


def test_submission_freezes_the_plan_and_starts_with_the_first_open_phase(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    chain, jobs = send(tmp_path, slurm, overrides="runs=elsewhere")
    assert chain.run_folder == str(tmp_path / "elsewhere" / "toy") and chain.overrides == ("runs=elsewhere", "seed=3")
    assert jobs == [101] and slurm.sent("sbatch") == [["sbatch", "--parsable", str(chain.script("alignment"))]]
    assert chain.script("refinement").read_text() == sbatch_text(load_chain(Path(chain.run_folder)), "refinement")
    # editing the recipe does not change a chain under way
    (tmp_path / "toy.yaml").write_text("name: changed")
    assert Path(chain.recipe).read_text() == RECIPE and Path(chain.ds_config).read_text() == ZERO
    # an interrupted chain, submitted again
    chain.mark_done("alignment", Outcome("done", "alignment", 5, "over", 1))
    (chain.folder / "stopped.json").write_text("{}")
    slurm.queued.clear()
    _, jobs = send(tmp_path, slurm, overrides="runs=elsewhere")
    assert (
        slurm.sent("sbatch")[-1][-1] == str(chain.script("refinement")) and not (chain.folder / "stopped.json").exists()
    )


def test_a_run_that_was_finished_outside_slurm_queues_nothing(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    chain, _ = send(tmp_path, slurm)
    run = Path(chain.run_folder)
    slurm.queued.clear()
    for done, step in (Outcome("done", "alignment", 10, "over", 1), 10), (Outcome("done", None, 10, "over", 1), 5):
        outcome.write(run, done)  # one phase only; a checkpoint that was removed since
        (run / "checkpoints" / f"step_{step:09d}").mkdir(parents=True)
        (run / "checkpoints" / f"step_{step:09d}" / "manifest.json").touch()
        assert len(send(tmp_path, slurm)[1]) == 1
        slurm.queued.clear()
        shutil.rmtree(run / "checkpoints")
    (run / "checkpoints" / "step_000000010").mkdir(parents=True)
    (run / "checkpoints" / "step_000000010" / "manifest.json").touch()
    finished, jobs = send(tmp_path, slurm)
    assert jobs == [] and finished.first_open_phase() is None


def test_a_lost_job_is_called_lost(world: World) -> None:
    world.ledger.add("submit", job=7, phase="alignment")
    world.ledger.add("start", attempt=1, job=7, phase="alignment", step=0)
    world.slurm.refuse = lambda command: command[0] == "scontrol"  # forgotten
    assert chain_status(world.folder, Slurm(world.slurm)).phases[0].state == "lost"


def test_links_are_submitted_ahead(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    chain, jobs = send(tmp_path, slurm, chain="singleton:3")
    assert len(jobs) == 6 and all("--dependency=singleton" in command for command in slurm.sent("sbatch"))
    assert Ledger(chain.folder).jobs("refinement") == jobs[3:]


def test_nothing_is_submitted_twice_or_with_wrong_shapes(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    (tmp_path / "toy.yaml").write_text(RECIPE)
    (tmp_path / "zero.json").write_text(ZERO)
    planned = plan_chain("toy.yaml", "zero.json", [], Site(nodes=2, gpus_per_node=2), home=tmp_path, slurm=Slurm(slurm))
    assert planned.phases == ("alignment", "refinement") and not Path(planned.run_folder).exists(), (
        "planning writes nothing"
    )
    with pytest.raises(UserError, match=r"5 ranks .*micro_batches=12 .*1, 2, 3, 4, 6, 12"):
        send(tmp_path, slurm, nodes=5, gpus_per_node=0)
    send(tmp_path, slurm)
    with pytest.raises(UserError, match=r"101 PENDING.*scancel --name=lvtrain-toy-\w{6}$"):
        send(tmp_path, slurm)
    # a run of the same name in another folder has another queue
    other, (job,) = send(tmp_path, slurm, overrides="runs=elsewhere")
    environment = {"SLURM_JOB_ID": "0"}
    Attempt(Path(other.run_folder), "alignment", slurm=Slurm(slurm), environment=environment).stop("enough")
    assert (job, slurm.queued) == (102, {101: "PENDING"})
    slurm.queued.clear()
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}')
    for name, named in {
        "mine.json": "fp16",
        "absent.json": "absent.json",
    }.items():  # not after hours in the queue
        with pytest.raises(UserError, match=named):
            plan_chain("toy.yaml", name, [], Site(nodes=2, gpus_per_node=2), home=tmp_path, slurm=Slurm(slurm))
    slurm.refuse = lambda command: command[0] == "sbatch"
    with pytest.raises(UserError, match="not today"):
        send(tmp_path, slurm)


def test_the_attempt_needs_the_standard_library_alone() -> None:
    """Outside a container there may be a bare python."""
    program = (
        "import sys; import lvtrain.launch.attempt, lvtrain.launch.__main__;"
        "bad = {'torch', 'numpy', 'pydantic', 'yaml', 'rich'} & set(sys.modules); sys.exit(f'imports {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


SCRIPTS = {
    "pco_vitl.sh": (8, "pco_vitl_webface42m"),
    "pco_vith.sh": (8, "pco_vith_webface42m"),
    "pco_vitb.sh": (4, "pco_vitb_glint360k"),
    "cluster.sh": (1, "cluster_vitb_webface4m"),
    "quickstart.sh": (2, "quickstart"),
    "recipe.sh": (1, "pco_vitl_webface42m"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_submits_its_recipe_with_the_settings_of_the_site(script: str, tmp_path: Path) -> None:
    """On a login node where sbatch takes everything. What is given at submission wins over the site's file."""
    for program, says in (("sbatch", "77"), ("squeue", "")):
        (tmp_path / program).write_text(f"#!/bin/sh\necho {says}\n")
        (tmp_path / program).chmod(0o755)
    example = (ROOT / "slurm" / "site.env.example").read_text()
    (tmp_path / "site.env").write_text(f'{example}\n: "${{LVTRAIN_MODULES:=cuda/13.0}}"\n')
    settings = {"LVTRAIN_SITE": str(tmp_path / "site.env"), "LVTRAIN_ACCOUNT": "faces", "LVTRAIN_TIME": "02:00:00"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "LVTRAIN"))}
    environment |= settings | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LVTRAIN_LAUNCH_PYTHON": sys.executable}
    nodes, recipe = SCRIPTS[script]
    any_recipe = [f"lvtrain/recipes/{recipe}.yaml", "ds_configs/zero1.json"] if script == "recipe.sh" else []
    command = ["bash", str(ROOT / "slurm" / script), *any_recipe, "name=it", f"runs={tmp_path}", "data.path=/faces"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and "scancel --name=lvtrain-it" in done.stdout, done.stderr
    chain = load_chain(tmp_path / "it")
    assert Path(chain.recipe).read_text() == (ROOT / "lvtrain" / "recipes" / f"{recipe}.yaml").read_text()
    assert chain.home == str(ROOT) and chain.overrides[-1] == "data.path=/faces"
    text = chain.script(chain.phases[0]).read_text()
    gpus = ["--ntasks-per-node=1"] if script == "quickstart.sh" else ["--ntasks-per-node=8", "--gpus-per-node=8"]
    for option in (f"--nodes={nodes}", *gpus, "--partition=gpu", "--account=faces", "--time=02:00:00"):
        assert f"#SBATCH {option}\n" in text
    assert f". {tmp_path}/site.env; set +a" in text and "\nmodule load cuda/13.0\n" in text
