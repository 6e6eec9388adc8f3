"""The chain's protocol on a real Slurm (slurmctld, two slurmd, munge on loopback), with a trainer in miniature and with the real one.

Chains run side by side; each is disturbed in its own way and must end with the value of an undisturbed run, or stop with its reason. They
wait at fault points until they have been disturbed, so nothing depends on how fast the machine is.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm_chains import ChainRun, sandbox, sbatch_quickstart, submit
from tools import trial

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1800),
]  # longer than a chain may take; the failure shows its ledger
PHASES = ("alignment", "stabilisation", "refinement")
STEPS = 30
FIRST, SECOND, THIRD = 5, 15, 25  # a step in each phase, at which a checkpoint has just been saved

RECIPE = """
name: {name}
runs: {runs}
data: {{path: none}}
method: {{name: pco}}
phases:
  - {{name: alignment, global_batch: 4, micro_batches: 2}}
  - {{name: stabilisation, global_batch: 4, micro_batches: 2}}
  - {{name: refinement, global_batch: 4, micro_batches: 2}}
schedule: {{total: {steps} steps}}
"""

# the real quick start, shortened: 3 phases of 10 steps of a smaller backbone on 24 identities
SHORT = [
    "backbone.overrides={dim: 32, depth: 2, heads: 2}",
    f"schedule.total={STEPS} steps",
    "schedule.warmup=2 steps",
    "checkpoint.every=5 steps",
    "logging={every: 1, trackers: []}",
    "evaluation.benchmarks={}",
    *(f"phases.{number}.global_batch=16" for number in range(3)),
    *(f"phases.{number}.end={{at_most: {STEPS // 3} steps}}" for number in range(2)),
]


def undisturbed() -> str:
    value = ""
    for step in range(STEPS):
        contribution = step + (step + 1)  # both ranks
        value = hashlib.sha256(f"{value}{step}{PHASES[step * 3 // STEPS]}{contribution}".encode()).hexdigest()
    return value


Story = tuple[ChainRun, list[int]]


@pytest.fixture(scope="module")
def stories(tiny_faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Story]]]:
    """All chains at the same time, each disturbed by its own thread: they mostly wait.

    A story is the chain, over by then, and the jobs that were disturbed.
    """
    runs = tmp_path_factory.mktemp("slurm")
    with (
        sandbox(runs / "sandbox") as slurm,
        sandbox(runs / "small") as small,  # for the one that takes the nodes away from everybody
        ThreadPoolExecutor(max_workers=8) as pool,
    ):

        def miniature(name: str, environment: dict[str, str] = slurm, **settings: str) -> ChainRun:
            recipe = runs / f"{name}.yaml"
            recipe.write_text(RECIPE.format(name=name, runs=runs, steps=STEPS))
            return submit(environment, recipe, runs / name, **settings)

        def quickstart(name: str, **settings: str) -> ChainRun:
            return sbatch_quickstart(slurm, runs / name, [*SHORT, f"data.path={tiny_faces / 'train'}"], **settings)

        def exclusive(name: str, **settings: str) -> ChainRun:
            return miniature(name, small, sbatch="--exclusive", **settings)

        def tell(
            start: Callable[..., ChainRun], disturb: Callable[[ChainRun], list[int]], name: str, **settings: str
        ) -> Story:
            chain = start(name, **settings)
            jobs = disturb(chain)
            chain.wait_until_over()
            return chain, jobs

        def hold(name: str, *steps: int, rank: str = "*") -> str:
            """Ranks wait at these steps, deaf to signals, until `struck` lets them go."""
            for step in steps:
                hold_file(runs / name, step).touch()
            return ";".join(f"loop.step:{rank}:{step}:hold={hold_file(runs / name, step)}" for step in steps)

        stories: dict[str, Future[Story]] = {}

        def begin(
            name: str,
            disturb: Callable[[ChainRun], list[int]],
            *faults: str,
            start: Callable[..., ChainRun] = miniature,
            **settings: str,
        ) -> None:
            stories[name] = pool.submit(tell, start, disturb, name, LVTRAIN_FAULT=";".join(faults), **settings)

        asked = f"loop.step:*:{FIRST}:asked"
        site = runs / "site.env"
        site.write_text(': "${LVTRAIN_CHAIN:=singleton:3}"\n')
        faults = asked, hold("quickstart", SECOND, THIRD)
        begin("quickstart", signal_kill_limit, *faults, start=quickstart, site=str(site))
        begin("links", limit_cancel, hold("links", FIRST, SECOND), chain="singleton:3")
        begin("limit", limit, hold("limit", SECOND))
        begin("signals", signal_kill_tasks, asked, hold("signals", SECOND))
        begin("evicted", urgent_job_lost_node, asked, hold("evicted", SECOND), start=exclusive)
        # the site's hooks bring these two their faults: a file each job sources, a command before python in each task
        setup = runs / "setup.sh"  # always just before a checkpoint; rank 0 would wait for ever
        setup.write_text(
            f"export LVTRAIN_FAULT='loop.step:1:{SECOND - 1}:sigkill;{hold('crash', SECOND - 1, rank='0')}'\n"
        )
        begin("crash", nothing, setup=str(setup))
        begin("error", nothing, chain="singleton:2", container=f"env LVTRAIN_FAULT=loop.step:*:{STEPS // 3}:fatal")
        yield stories


def hold_file(run_folder: Path, step: int) -> Path:
    return run_folder.with_name(f"{run_folder.name}-hold-{step}")


# --------------------------------------------------------------------------------------------------- ways of disturbing a chain


def nothing(chain: ChainRun) -> list[int]:
    return []


def struck(chain: ChainRun, phase: str, step: int, strike: Callable[[int], object]) -> int:
    """Disturbs the phase's job while its ranks wait at this step and ignore signals; releases them once they are gone."""
    job = chain.running_job(phase, past_step=step - 1)
    strike(job)
    chain.wait_until_struck(job)
    hold_file(chain.run_folder, step).unlink()
    return job


def signalled(chain: ChainRun) -> int:
    """The first phase's job is asked to stop while its ranks wait for just that."""
    job = chain.running_job("alignment", past_step=FIRST - 1)
    chain.command("scancel", "--signal=USR2", str(job))
    return job


def signal_kill_limit(chain: ChainRun) -> list[int]:
    """One job a phase: pre-empted by a signal, killed, at its time limit (deaf to the warning before it)."""
    first = signalled(chain)
    second = struck(chain, "stabilisation", SECOND, lambda job: chain.command("scancel", "--signal=KILL", str(job)))
    return [first, second, struck(chain, "refinement", THIRD, chain.reach_time_limit)]


def limit_cancel(chain: ChainRun) -> list[int]:
    first = struck(chain, "alignment", FIRST, chain.reach_time_limit)
    return [first, struck(chain, "stabilisation", SECOND, lambda job: chain.command("scancel", str(job)))]


def limit(chain: ChainRun) -> list[int]:
    return [struck(chain, "stabilisation", SECOND, chain.reach_time_limit)]


def signal_kill_tasks(chain: ChainRun) -> list[int]:
    first = signalled(chain)
    kill = ("scancel", "--signal=KILL")
    return [first, struck(chain, "stabilisation", SECOND, lambda job: chain.command(*kill, f"{job}.0"))]


def urgent_job_lost_node(chain: ChainRun) -> list[int]:
    """Slurm's own pre-emption by a job of a partition that comes first; then a node goes down."""
    first = chain.running_job("alignment", past_step=FIRST - 1)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    other = int(chain.command("sbatch", "--parsable", *urgent))
    chain.wait(lambda: "JobState=COMPLETED" in state_of(chain, other), "the urgent job")
    down = ("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    second = struck(chain, "stabilisation", SECOND, lambda job: chain.command(*down))
    # refused if the node has come back by itself meanwhile (ReturnToService)
    resume = ["scontrol", "update", "NodeName=n1", "State=RESUME"]
    subprocess.run(resume, env=chain.environment, capture_output=True, timeout=180)
    return [first, second]


# ---------------------------------------------------------------------------------------------------------- what came of them


def state_of(chain: ChainRun, job: int) -> str:
    return chain.command("scontrol", "show", "job", str(job))


def assert_complete(chain: ChainRun) -> None:
    assert not (chain.run_folder / "slurm" / "stopped.json").exists(), chain.story()
    assert all((chain.run_folder / "phase_done" / f"{phase}.json").exists() for phase in PHASES), chain.story()


def assert_undisturbed(chain: ChainRun) -> None:
    assert_complete(chain)
    state = json.loads((chain.run_folder / "checkpoints" / f"step_{STEPS:09d}" / "state.json").read_text())
    assert state == {"step": STEPS, "value": undisturbed()}


def test_an_error_stops_the_chain_and_its_links(stories: dict[str, Future[Story]]) -> None:
    chain, _ = stories["error"].result()
    assert len(chain.ledger("submit")) == 6  # two links a phase
    (stopped,) = chain.ledger("stop")
    assert all(part in stopped["reason"] for part in ("stabilisation", "step 10", "the impossible"))
    assert [record["phase"] for record in chain.ledger("start")] == ["alignment", "stabilisation"], chain.story()


def test_three_attempts_without_progress_stop_the_chain(stories: dict[str, Future[Story]]) -> None:
    chain, _ = stories["crash"].result()
    assert [record["phase"] for record in chain.ledger("start")] == ["alignment"] + 3 * ["stabilisation"], chain.story()
    (stopped,) = chain.ledger("stop")
    assert all(part in stopped["reason"] for part in ("3 attempts", "stabilisation", "step 10"))
    assert json.loads((chain.run_folder / "slurm" / "stopped.json").read_text()) == stopped
    logs = "".join(path.read_text() for path in chain.run_folder.glob("slurm/*.log"))
    assert logs.count("chain stopped:") == 1
    assert [record["suspect"] for record in chain.ledger("end")[1:]] == 3 * ["n1"]  # where rank 1 fell
    assert any(option.startswith("--begin=") for record in chain.ledger("submit") for option in record["options"])


def test_signalled_then_tasks_killed(stories: dict[str, Future[Story]]) -> None:
    """USR2: all ranks save the same step, the job requeues itself. SIGKILL of the tasks: a crash with progress, requeued."""
    chain, (first, second) = stories["signals"].result()
    assert_undisturbed(chain)
    ends = [(record["phase"], record["outcome"], record["decision"]) for record in chain.ledger("end")]
    assert ends == [
        ("alignment", "requeue", "again"),
        ("alignment", "done", "finished"),
        ("stabilisation", "none", "again"),
        ("stabilisation", "done", "finished"),
        ("refinement", "done", "finished"),
    ]
    jobs = [(record["job"], record["restart"]) for record in chain.ledger("start")]
    assert jobs[:2] == [(first, 0), (first, 1)] and jobs[2:4] == [(second, 0), (second, 1)]
    assert len(chain.ledger("submit")) == 3  # one job a phase


def test_killed_at_the_time_limit_or_cancelled_a_link_takes_over(stories: dict[str, Future[Story]]) -> None:
    chain, (first, second) = stories["links"].result()
    assert_undisturbed(chain)
    assert "JobState=TIMEOUT" in state_of(chain, first) and "JobState=CANCELLED" in state_of(chain, second)
    assert [record["phase"] for record in chain.ledger("start")] == 2 * ["alignment"] + 2 * ["stabilisation"] + [
        "refinement"
    ]


def test_killed_at_the_time_limit_a_new_job_takes_over(stories: dict[str, Future[Story]]) -> None:
    """Slurm never requeues a timed-out job, so in requeue mode its batch script hands over in the seconds it has left."""
    chain, (job,) = stories["limit"].result()
    assert_undisturbed(chain)
    jobs = [record["job"] for record in chain.ledger("start") if record["phase"] == "stabilisation"]
    assert len(jobs) == len(set(jobs)) == 2 and jobs[0] == job, chain.story()
    assert "JobState=TIMEOUT" in state_of(chain, job)


def test_quickstart_three_ways_interrupted_ends_with_the_same_bits(
    stories: dict[str, Future[Story]], tiny_faces: Path, tmp_path: Path
) -> None:
    """`sbatch slurm/quickstart.sh`, the real trainer, over 2 nodes x 1 task, against an undisturbed run without Slurm."""
    recipe = ["--recipe", "lvtrain/recipes/quickstart.yaml", "--ds_config", "ds_configs/zero2.json"]
    words = [*recipe, *SHORT, f"data.path={tiny_faces / 'train'}", f"runs={tmp_path}"]
    codes = trial.end(trial.start(2, words, tmp_path / "log.txt"), 600)
    assert codes == [0, 0], (tmp_path / "log.txt").read_text()[-3000:]
    chain, jobs = stories["quickstart"].result()
    assert_complete(chain)
    first, second, third = (state_of(chain, job) for job in jobs)
    assert "ExitCode=75" in first, first
    assert "JobState=CANCELLED" in second, second
    assert "JobState=TIMEOUT" in third, third
    assert len({record["job"] for record in chain.ledger("start")}) == 6, chain.story()
    ours, theirs = trial.contents(chain.run_folder), trial.contents(tmp_path / "quickstart")
    assert sum(name.startswith("metrics") for name in theirs) == STEPS and "classifier.weight" in theirs
    assert [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)] == []


def test_preempted_by_an_urgent_job_then_a_node_is_lost(stories: dict[str, Future[Story]]) -> None:
    """Slurm's own pre-emption (SIGTERM, grace time, requeue) and its requeue after a node goes down."""
    chain, (first, second) = stories["evicted"].result()
    assert_undisturbed(chain)
    starts = [(record["phase"], record["job"], record["restart"]) for record in chain.ledger("start")]
    assert starts[:4] == [
        ("alignment", first, 0),
        ("alignment", first, 1),
        ("stabilisation", second, 0),
        ("stabilisation", second, 1),
    ]
    assert {record["attempt"]: record["outcome"] for record in chain.ledger("end")}[1] == "requeue"
