"""The chain's protocol on a real Slurm (slurmctld, two slurmd, munge on loopback), with a trainer in miniature.

Chains run side by side; each is disturbed in its own way and must end with the value of an undisturbed run, or stop with its reason.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.slurm_chains import ChainRun, sandbox, sbatch_quickstart, submit

pytestmark = pytest.mark.slurm
PHASES = ("alignment", "stabilisation", "refinement")
STEPS = 120

RECIPE = """
name: {name}
runs: {runs}
data: {{path: none}}
method: {{name: pco}}
phases:
  - {{name: alignment, global_batch: 4, virtual_batches: 2}}
  - {{name: stabilisation, global_batch: 4, virtual_batches: 2}}
  - {{name: refinement, global_batch: 4, virtual_batches: 2}}
schedule: {{total: {steps} steps}}
"""

# the real quick start, shortened: 3 phases of 40 steps of a smaller backbone on 24 identities, a checkpoint every 5 steps
SHORT = [
    "backbone.overrides={dim: 32, depth: 2, heads: 2}",
    "schedule.total=120 steps",
    "schedule.warmup=5 steps",
    "checkpoint.every=5 steps",
    "evaluation.benchmarks={}",
    *(f"phases.{number}.global_batch=16" for number in range(3)),
    *(f"phases.{number}.end={{at_most: 40 steps}}" for number in range(2)),
]


def undisturbed() -> str:
    value = ""
    for step in range(STEPS):
        contribution = step + (step + 1)  # both ranks
        value = hashlib.sha256(f"{value}{step}{PHASES[step * 3 // STEPS]}{contribution}".encode()).hexdigest()
    return value


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with sandbox(tmp_path_factory.mktemp("slurm") / "sandbox") as environment:
        yield environment


HELD = (20, 60, 100)  # the quick start waits at these steps, just saved, until it has been struck
Story = tuple[ChainRun, list[int]]


@pytest.fixture(scope="module")
def stories(
    slurm: dict[str, str], tiny_faces: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Story]]]:
    """All chains side by side, each disturbed by a thread of its own: most of their time is waiting.

    A story is the chain, over by then, and the jobs that were disturbed.
    """
    runs = tmp_path_factory.mktemp("runs")

    def start(name: str, **settings: str) -> ChainRun:
        recipe = runs / f"{name}.yaml"
        recipe.write_text(RECIPE.format(name=name, runs=runs, steps=STEPS))
        return submit(slurm, recipe, runs / name, **settings)

    def quickstart(name: str, **settings: str) -> ChainRun:
        return sbatch_quickstart(slurm, runs / name, [f"data.path={tiny_faces / 'train'}", *SHORT], **settings)

    def tell(
        disturb: Callable[[ChainRun], list[int]], start: Callable[..., ChainRun], name: str, **settings: str
    ) -> Story:
        chain = start(name, **settings)
        jobs = disturb(chain)
        chain.wait_until_over()
        return chain, jobs

    with ThreadPoolExecutor(max_workers=8) as pool:
        stories: dict[str, Future[Story]] = {}

        def begin(
            name: str, start: Callable[..., ChainRun], disturb: Callable[[ChainRun], list[int]], **settings: str
        ) -> None:
            stories[name] = pool.submit(tell, disturb, start, name, **settings)

        # slow steps: a window of some seconds in which to strike, on any machine
        slow = {"STANDIN_STEP_SECONDS": "0.15"}
        hold = ";".join(f"loop.step:*:{step}:hold={hold_file(runs / 'quickstart', step)}" for step in HELD)
        for step in HELD:
            hold_file(runs / "quickstart", step).touch()
        begin("quickstart", quickstart, signal_kill_limit, chain="singleton:3", LVTRAIN_FAULT=hold)
        begin("undisturbed", quickstart, nothing)
        begin("links", start, limit_cancel, chain="singleton:3", STANDIN_FAULT="deaf:alignment", **slow)
        begin("limit", start, limit, STANDIN_FAULT="deaf:stabilisation")
        begin("signals", start, signal_kill_tasks, **slow)
        begin("crash", start, nothing, STANDIN_FAULT=f"crash:stabilisation:{STEPS // 2}")
        begin("error", start, nothing, chain="singleton:2", STANDIN_FAULT="fatal:stabilisation")
        yield stories


def nothing(chain: ChainRun) -> list[int]:
    return []


def hold_file(run_folder: Path, step: int) -> Path:
    return run_folder.parent / f"{run_folder.name}-hold-{step}"


def signal_kill_limit(chain: ChainRun) -> list[int]:
    """One job a phase: pre-empted by a signal, killed, at its time limit (deaf to the warning before it)."""
    first = chain.running_job("alignment", past_step=HELD[0] - 1)
    chain.command("scancel", "--signal=USR2", str(first))
    hold_file(chain.run_folder, HELD[0]).unlink()
    second = chain.running_job("stabilisation", past_step=HELD[1] - 1)
    chain.command("scancel", "--signal=KILL", str(second))
    hold_file(chain.run_folder, HELD[1]).unlink()
    third = chain.running_job("refinement", past_step=HELD[2] - 1)
    chain.shorten(third)
    chain.wait(lambda: "JobState=TIMEOUT" in state_of(chain, third), f"the time limit of job {third}")
    hold_file(chain.run_folder, HELD[2]).unlink()
    return [first, second, third]


def limit_cancel(chain: ChainRun) -> list[int]:
    first = chain.running_job("alignment", past_step=0)
    chain.shorten(first)
    second = chain.running_job("stabilisation", past_step=STEPS // 3)
    chain.command("scancel", str(second))
    return [first, second]


def limit(chain: ChainRun) -> list[int]:
    job = chain.running_job("stabilisation", past_step=STEPS // 3)
    chain.shorten(job)
    return [job]


def signal_kill_tasks(chain: ChainRun) -> list[int]:
    first = chain.running_job("alignment", past_step=0)
    chain.command("scancel", "--signal=USR2", str(first))
    second = chain.running_job("stabilisation", past_step=STEPS // 3)
    chain.command("scancel", "--signal=KILL", f"{second}.0")
    return [first, second]


def state_of(chain: ChainRun, job: int) -> str:
    return chain.command("scontrol", "show", "job", str(job))


def assert_complete(chain: ChainRun) -> None:
    assert not (chain.run_folder / "slurm" / "stopped.json").exists(), chain.story()
    assert all((chain.run_folder / "phase_done" / f"{phase}.json").exists() for phase in PHASES), chain.story()


def assert_undisturbed(chain: ChainRun) -> None:
    assert_complete(chain)
    state = json.loads((chain.run_folder / "checkpoints" / f"step_{STEPS:09d}" / "state.json").read_text())
    assert state == {"step": STEPS, "value": undisturbed()}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every rank, by file and name."""
    return {
        f"{path.name}:{name}": tensor
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_an_error_stops_the_chain_and_its_links(stories: dict[str, Future[Story]]) -> None:
    chain, _ = stories["error"].result()
    assert len(chain.ledger("submit")) == 6  # two links a phase
    (stopped,) = chain.ledger("stop")
    assert stopped["reason"] == "error in phase stabilisation at step 40: the recipe asks for the impossible"
    assert [record["phase"] for record in chain.ledger("start")] == ["alignment", "stabilisation"], chain.story()


def test_three_attempts_without_progress_stop_the_chain(stories: dict[str, Future[Story]]) -> None:
    chain, _ = stories["crash"].result()
    assert [record["phase"] for record in chain.ledger("start")] == ["alignment"] + 3 * ["stabilisation"], chain.story()
    (stopped,) = chain.ledger("stop")
    assert "3 attempts at phase stabilisation made no progress past step 40" in stopped["reason"]
    assert json.loads((chain.run_folder / "slurm" / "stopped.json").read_text()) == stopped
    logs = "".join(path.read_text() for path in chain.run_folder.glob("slurm/*.log"))
    assert logs.count("chain stopped:") == 1
    assert "n1" in {record["suspect"] for record in chain.ledger("end")[1:]}  # rank 1 fell first
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


def test_quickstart_three_ways_interrupted_ends_with_the_same_bits(stories: dict[str, Future[Story]]) -> None:
    """`sbatch slurm/quickstart.sh`, the real trainer, over 2 nodes x 1 task, against a chain nobody disturbed."""
    chain, jobs = stories["quickstart"].result()
    peer, _ = stories["undisturbed"].result()
    assert_complete(chain)
    assert_complete(peer)
    first, second, third = (state_of(chain, job) for job in jobs)
    assert "ExitCode=75" in first, first
    assert "JobState=CANCELLED" in second, second
    assert "JobState=TIMEOUT" in third, third
    assert len({record["job"] for record in chain.ledger("start")}) == 6 and len(peer.ledger("start")) == 3
    left, right = (tensors(each.run_folder / "checkpoints" / "step_000000120") for each in (chain, peer))
    assert left.keys() == right.keys() and len(left) > 10
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_preempted_by_an_urgent_job_then_a_node_is_lost(
    stories: dict[str, Future[Story]], slurm: dict[str, str], tmp_path: Path
) -> None:
    """Slurm's own pre-emption (SIGTERM, grace time, requeue) and its requeue after a node goes down."""
    wait(stories.values())  # this one takes the nodes away from everybody
    recipe = tmp_path / "evicted.yaml"
    recipe.write_text(RECIPE.format(name="evicted", runs=tmp_path, steps=STEPS))
    chain = submit(slurm, recipe, tmp_path / "evicted", sbatch="--exclusive", STANDIN_STEP_SECONDS="0.1")
    job = chain.running_job("alignment", past_step=0)
    urgent = [
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=true",
    ]
    other = int(chain.command(*urgent))
    chain.wait(lambda: "JobState=COMPLETED" in state_of(chain, other), "the urgent job")
    lost = chain.running_job("stabilisation", past_step=STEPS // 3)
    chain.command("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    chain.wait(lambda: "JobState=PENDING" in state_of(chain, lost), "the requeue")
    # refused if the node has come back by itself meanwhile (ReturnToService)
    subprocess.run(["scontrol", "update", "NodeName=n1", "State=RESUME"], env=chain.environment, capture_output=True)
    chain.wait_until_over()
    assert_undisturbed(chain)
    starts = [(record["phase"], record["job"], record["restart"]) for record in chain.ledger("start")]
    assert starts[:4] == [
        ("alignment", job, 0),
        ("alignment", job, 1),
        ("stabilisation", lost, 0),
        ("stabilisation", lost, 1),
    ]
    assert {record["attempt"]: record["outcome"] for record in chain.ledger("end")}[1] == "requeue"
