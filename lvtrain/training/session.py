"""One start of a run: open the world and the folder, train, say how it ended, close everything."""

from __future__ import annotations

import os
import time
from typing import Any

from lvtrain.checkpoint.checkpoints import Checkpoints
from lvtrain.checkpoint.lease import InUse, Lease, hold
from lvtrain.data import ShardDataset
from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.methods.distill import Teacher
from lvtrain.recipe.sections import Recipe
from lvtrain.training import outcome
from lvtrain.training.checks import check_benchmarks
from lvtrain.training.heartbeat import Heartbeat
from lvtrain.training.preemption import Preemption
from lvtrain.training.run_folder import Run, open_folder
from lvtrain.training.telemetry import Telemetry
from lvtrain.training.train import Ending, train

_STARTED = time.monotonic()


def train_session(
    recipe: Recipe,
    ds_config: dict[str, Any],
    dataset: ShardDataset,
    *,
    only_phase: str | None,
    max_time_minutes: float | None,
    teacher: Teacher | None = None,
) -> bool:
    """Returns True when the run (or `only_phase`) is done, False when it stopped early on request. `teacher`: what `method.distill` names.

    Raises:
        UserError: the run cannot go on; `outcome.json` then says fatal and why.
    """
    if recipe.deterministic:
        _make_deterministic()
    timeout = recipe.safety.collective_timeout
    world = worlds.start(timeout)
    try:
        worlds.on_first(lambda: check_benchmarks(recipe))
        with hold(recipe.run_folder, world) as lease:
            ending = _train(recipe, ds_config, dataset, world, lease, only_phase, max_time_minutes, teacher)
        # a rank that leaves with 75 before rank 0 has written would have srun take rank 0 down
        worlds.barrier()
        return ending.verdict == "done"
    finally:
        worlds.stop()


def _train(
    recipe: Recipe,
    ds_config: dict[str, Any],
    dataset: ShardDataset,
    world: World,
    lease: Lease | None,
    only_phase: str | None,
    max_time_minutes: float | None,
    teacher: Teacher | None,
) -> Ending:
    timeout = recipe.safety.collective_timeout
    folder, run_id, attempt, told = open_folder(recipe, ds_config, world, licence=dataset.manifest.licence)
    run = Run(recipe, ds_config, dataset, world, folder, run_id, attempt, teacher)
    telemetry = Telemetry(folder, world, tensorboard=recipe.logging.tensorboard)
    for change in told:
        telemetry.event("recipe_changed", change=change)
        telemetry.say(f"lvtrain: recipe changed since the last start: {change}")
    if teacher is not None:
        telemetry.event("teacher", name=teacher.name, fingerprint=teacher.fingerprint.hex())
        telemetry.say(f"lvtrain: distilling from {teacher.name}")
    allotted = max_time_minutes * 60 if max_time_minutes else None
    ending: Ending | None = None  # stays None when the attempt crashes: no outcome.json says so
    try:
        with (
            Heartbeat(folder, world.rank, timeout) as heart,
            Preemption(world, allotted, started=_STARTED, vote_timeout_seconds=timeout) as preemption,
            Checkpoints(
                folder,
                world,
                keep_last=recipe.checkpoint.keep_last,
                keep_every_samples=_keep_every(recipe, dataset),
                run_id=run_id,
                fingerprint=dataset.fingerprint,
                lease=lease,
            ) as checkpoints,
        ):
            ending = train(run, checkpoints, telemetry, preemption, heart, only_phase=only_phase)
        verdict = "done" if ending.verdict == "done" else "stop"
        telemetry.event(verdict, step=ending.step, phase=ending.phase, reason=ending.reason)
        then = (
            f"python tools/report.py {folder} shows it"
            if ending.verdict == "done"
            else "start the same command again to go on"
        )
        telemetry.say(f"lvtrain: {verdict} at step {ending.step}: {ending.reason}; run folder {folder}; {then}")
    except InUse:  # another job took the folder over: its events and its outcome are that job's
        raise
    except UserError as error:
        telemetry.event("error", reason=str(error))
        ending = Ending("fatal", outcome.committed_step(folder), only_phase, str(error))
        raise
    finally:
        telemetry.close()
        # a fatal error is told by any rank that met it: rank 0 may be waiting for it in a collective
        if ending is not None and (world.is_first or ending.verdict == "fatal"):
            outcome.write(folder, outcome.Outcome(ending.verdict, ending.phase, ending.step, ending.reason, attempt))
    return ending


def _make_deterministic() -> None:
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def _keep_every(recipe: Recipe, dataset: ShardDataset) -> int | None:
    every = recipe.checkpoint.keep_every
    return every.samples(global_batch=recipe.phases[0].global_batch, samples_per_epoch=len(dataset)) if every else None
