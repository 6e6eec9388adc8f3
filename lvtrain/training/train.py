"""A run from wherever its folder stands to its end, phase by phase.

A phase is built, restored from the newest checkpoint and run; its end writes a checkpoint, and the next phase is built from that one. So going
from phase to phase, being pre-empted and coming back, and changing the number of GPUs are one path.
"""

from __future__ import annotations

from dataclasses import dataclass

from lvtrain.checkpoint.checkpoints import Checkpoints
from lvtrain.errors import UserError
from lvtrain.training.heartbeat import Heartbeat
from lvtrain.training.loop import PhaseRun, RollBack
from lvtrain.training.outcome import Verdict
from lvtrain.training.position import Position
from lvtrain.training.preemption import Preemption
from lvtrain.training.run_folder import Run
from lvtrain.training.schedule import learning_rate
from lvtrain.training.telemetry import Telemetry

_ROLLBACKS = 3  # to one checkpoint: what is not finite after that is not a stretch of bad data


@dataclass(frozen=True)
class Ending:
    """How a start ended: done (the run, or the one phase asked for) or requeue (stopped early on request, checkpoint written)."""

    verdict: Verdict
    step: int
    phase: str | None
    reason: str


def train(
    run: Run,
    checkpoints: Checkpoints,
    telemetry: Telemetry,
    preemption: Preemption,
    heart: Heartbeat,
    *,
    only_phase: str | None = None,
) -> Ending:
    """Trains from wherever the run folder stands to its end, to the end of `only_phase`, or until asked to stop.

    Raises:
        UserError: nothing valid to resume from although something is there, a recipe that does not fit, data or numbers gone bad.
    """
    resume = run.recipe.checkpoint.resume
    found = checkpoints.newest()
    if found is not None and resume == "never":
        raise UserError(f"checkpoint.resume=never but {run.folder} holds a run; choose another name=..., or remove it")
    if found is None and resume == "must":
        raise UserError(
            f"checkpoint.resume=must but {run.folder}/checkpoints holds no checkpoint; start with resume=auto"
        )
    position = Position(**found.meta["position"]) if found else Position()
    telemetry.forget_after(position.step)
    phases = run.recipe.phases
    rate = learning_rate(
        run.recipe.schedule, run.recipe.optimizer.lr, phases=phases, samples_per_epoch=len(run.dataset)
    )
    if complete := _complete(run, position, rate.total, only_phase):
        return Ending(
            "done", position.step, only_phase, f"{complete} since an earlier start, so nothing is left to train"
        )
    telemetry.event(
        "resume" if found else "start",
        step=position.step,
        samples_seen=position.samples_seen,
        world_size=run.world.size,
        attempt=run.attempt,
    )
    at = phases[position.phase_index + int(position.phase_over)].name
    telemetry.say(
        f"lvtrain: {'resuming' if found else 'starting'} {run.folder} at step {position.step}, phase {at}, "
        f"{run.world.size} rank{'s' if run.world.size > 1 else ''} on {run.world.device.type}"
    )
    if rate.warning:
        telemetry.say(f"warning: {rate.warning}")
    data_skip = position.data_skip
    gone_back_to: list[int] = []
    while True:
        index = position.phase_index + int(position.phase_over)
        if complete := _complete(run, position, rate.total, only_phase):
            return Ending("done", position.step, only_phase, complete)
        if preemption.reason is not None:
            # agreed after the last phase's last step, whose checkpoint is there; building the next phase could take all the time that is left
            return Ending("requeue", position.step, phases[index].name, preemption.reason)
        phase = PhaseRun(run, checkpoints, telemetry, preemption, heart, rate, position, found, data_skip)
        try:
            if not phase.run():
                return Ending("requeue", phase.position.step, phases[index].name, preemption.reason or "asked to stop")
        except RollBack as back:
            found = checkpoints.newest()
            if found is None:
                raise UserError(
                    "the loss is not finite and there is no checkpoint to go back to; lower optimizer.lr or lengthen schedule.warmup"
                ) from back
            if gone_back_to.count(found.step) == _ROLLBACKS:
                raise UserError(
                    f"the loss is not finite whatever data is skipped: {_ROLLBACKS} roll-backs to step {found.step} did not get past it; "
                    "lower optimizer.lr, or go on from an earlier checkpoint by removing later ones"
                ) from back
            gone_back_to.append(found.step)
            position = Position(**found.meta["position"])
            data_skip = back.position.stream - position.samples_seen
            telemetry.event("rollback", step=back.position.step, to_step=position.step, data_skip=data_skip)
            telemetry.forget_after(position.step)
            continue
        finally:
            phase.built.close()
        found = checkpoints.newest()
        if found is None:
            raise UserError(
                f"the checkpoint of phase {phases[index].name}'s end has vanished from {run.folder}/checkpoints"
            )
        position = Position(**found.meta["position"])
        data_skip = position.data_skip


def _complete(run: Run, position: Position, total: int, only_phase: str | None) -> str | None:
    """What is complete, the run or the one phase asked for; None while it is to be trained.

    Raises:
        UserError: the phase asked for cannot be next.
    """
    names = [phase.name for phase in run.recipe.phases]
    index = position.phase_index + int(position.phase_over)
    if position.phase_over and position.samples_seen >= total:
        never = f", before {' and '.join(names[index:])} began" if index < len(names) else ""
        return f"the schedule is complete{never}"
    if index >= len(names):
        return "every phase is complete"
    if only_phase is None or names[index] == only_phase:
        return None
    if names.index(only_phase) > index:
        raise UserError(f"phase {only_phase} cannot start: {names[index]} is not finished in {run.folder}")
    return f"phase {only_phase} is complete"
