"""The trainer: one start of a run, from phase to phase, step by step.

    train(recipe, ...)          opens the ranks and the run folder
      Trainer.run               writes `outcome.json`
        Trainer.train_phases    from the run's position to its end
          Trainer.train_phase   the loop: step, stop?, log, save, evaluate
            Trainer.step        one global batch

`Trainer` holds what exists once per start; `PhaseState` holds what exists once per phase; `RunLog` says what happens.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lvtrain import faults, randomness
from lvtrain.backbones.registry import compiles_whole
from lvtrain.checkpoint.checkpoints import CheckpointInfo, Checkpoints
from lvtrain.checkpoint.lease import Fence, FolderInUse, hold
from lvtrain.classifier.kernel import choose_kernel
from lvtrain.data import Batch, ShardDataset
from lvtrain.distributed import world as worlds
from lvtrain.errors import UserError
from lvtrain.methods import LossOutput, StepInfo
from lvtrain.recipe.sections import Recipe
from lvtrain.training import outcome as outcomes
from lvtrain.training.checks import check_benchmarks
from lvtrain.training.earlier_starts import decide_micro_batches
from lvtrain.training.evaluations import Evaluations
from lvtrain.training.heartbeat import Heartbeat
from lvtrain.training.nonfinite import FILE, IN_ROW, RollBack, RollBacks
from lvtrain.training.outcome import Outcome, Verdict
from lvtrain.training.phase_state import PhaseState, Setup
from lvtrain.training.run_folder import keep_provenance, open_folder
from lvtrain.training.run_log import RunLog
from lvtrain.training.schedule import Position, learning_rate, phase_end_reason, what_is_complete
from lvtrain.training.stopping import Stopping

_STARTED = time.monotonic()


def train(
    recipe: Recipe,
    ds_config: dict[str, Any],
    dataset: ShardDataset,
    *,
    only_phase: str | None = None,
    max_minutes: float | None = None,
) -> Outcome:
    """One start of a run: trains until the run (or `only_phase`) is done, or until asked to stop.

    Raises:
        UserError: the run cannot continue; `outcome.json` then holds the error and the word fatal.
    """
    if recipe.deterministic:
        _make_deterministic()
    world = worlds.start(recipe.safety.collective_timeout)
    try:
        worlds.on_first(lambda: check_benchmarks(recipe))
        recipe = decide_micro_batches(recipe, ds_config, num_classes=dataset.num_classes, world=world)
        setup = Setup(recipe, ds_config, dataset, world)
        with hold(recipe.run_folder, world) as fence:
            outcome = Trainer(setup, fence, only_phase=only_phase, max_minutes=max_minutes).run()
        # srun would end rank 0 before it has written, if another rank left first with status 75
        worlds.barrier()
        return outcome
    finally:
        worlds.stop()


class Trainer:
    """What exists once per start: data, ranks, run folder, checkpoints, log, stopping, heartbeat, schedule.

    Construction and all methods are collectives.

    Raises:
        UserError: the run folder holds another run, or cannot be written; a schedule that does not fit the phases.
    """

    def __init__(
        self, setup: Setup, fence: Fence, *, only_phase: str | None = None, max_minutes: float | None = None
    ) -> None:
        recipe, world, dataset = setup.recipe, setup.world, setup.dataset
        self.setup, self.recipe, self.world, self.only_phase = setup, recipe, world, only_phase
        per_epoch = len(dataset)
        self.rate = learning_rate(recipe.schedule, recipe.optimizer, phases=recipe.phases, samples_per_epoch=per_epoch)
        kernel = choose_kernel(recipe.classifier.numerics.kernel, world.device) if recipe.classifier else None
        facts: dict[str, Any] = {"data_licence": dataset.manifest.licence, "classifier_kernel": kernel}
        facts |= {"identities": dataset.num_classes, "images": per_epoch}
        if recipe.backbone.compile and not compiles_whole(recipe.backbone.name):
            facts["compiled"] = "block by block"
        self.folder = open_folder(
            recipe, setup.ds_config, world, fingerprint=dataset.fingerprint, facts=facts, fence=fence
        )
        keep_provenance(self.folder.path, recipe, dataset, fence)
        self.log = RunLog(setup, self.folder, fence, kernel=kernel)
        self.evaluations = Evaluations(recipe, self.log, total=self.rate.total)
        timeout = recipe.safety.collective_timeout
        self.heartbeat = Heartbeat(self.folder.path, world.rank, timeout, fence=fence)
        self.stopping = Stopping(
            world, max_minutes * 60 if max_minutes else None, started=_STARTED, vote_timeout_seconds=timeout
        )
        keep_every = recipe.checkpoint.keep_every
        per = {"global_batch": recipe.phases[0].global_batch, "samples_per_epoch": per_epoch}
        self.checkpoints = Checkpoints(
            self.folder.path,
            world,
            keep_last=recipe.checkpoint.keep_last,
            keep_every_samples=keep_every.samples(**per) if keep_every else None,
            run_id=self.folder.run_id,
            fingerprint=dataset.fingerprint,
            lease=fence,
        )

    # ------------------------------------------------------------------------------------------------- from phase to phase

    def run(self) -> Outcome:
        """Trains, and writes `outcome.json` unless this start crashes."""
        try:
            with self.heartbeat, self.stopping, self.checkpoints:
                outcome = self.train_phases()
            self.log.done(outcome)
            return outcome
        except FolderInUse:  # another job took the folder over: its events and its outcome are that job's
            raise
        except UserError as error:
            with contextlib.suppress(FolderInUse):  # rank 0 has written the same and left, or another job came
                step = outcomes.committed_step(self.folder.path)
                self.log.failed(self._outcome("fatal", step, self.only_phase, str(error)))
            raise
        finally:
            self.log.telemetry.close()

    def train_phases(self) -> Outcome:
        """Trains from the run's position to its end, to the end of `only_phase`, or until asked to stop.

        Raises:
            UserError: there are checkpoints but none is valid; or too many bad images or non-finite steps.
        """
        found = self.checkpoints.to_resume(self.recipe.checkpoint.resume)
        position = Position.stored_in(found) if found else Position()
        self.log.begin(position)
        if complete := self._complete(position):
            if found is not None and self.evaluations.is_missing(position):
                self._evaluate_again(found, position)
            reason = f"{complete} since an earlier start, so nothing is left to train"
            return self._outcome("done", position.step, self.only_phase, reason)
        self.log.start(position, resumes=found is not None)
        roll_backs = RollBacks(self.checkpoints)
        while True:
            if complete := self._complete(position):
                return self._outcome("done", position.step, self.only_phase, complete)
            name = self.recipe.phases[position.next_index].name
            if self.stopping.reason is not None:
                # agreed after the last step of the phase before; building the next one could take all the time that is left
                return self._outcome("requeue", position.step, name, self.stopping.reason)
            phase = self.open_phase(found, position)
            try:
                if not self.train_phase(phase):
                    return self._outcome("requeue", phase.position.step, name, self.stopping.reason or "asked to stop")
                if (found := self.checkpoints.newest()) is None:
                    raise UserError(f"{self.folder.path}/checkpoints lost the checkpoint of the end of phase {name}")
                position = Position.stored_in(found)
            except RollBack as back:
                found, position = roll_backs.add(back.position)
                self.log.rollback(back.position, position)
            finally:
                phase.close()
                # DeepSpeed's engine refers to itself; uncollected, these weights would stay beside those of the next phase
                del phase
                gc.collect()

    def open_phase(self, found: CheckpointInfo | None, position: Position) -> PhaseState:
        """Builds the phase that is trained next, from a checkpoint or, if there is none, from its first weights."""
        start = position.next_phase() if position.phase_over else replace(position)
        phase = PhaseState(self.setup, self.rate, start, fresh=found is None)
        self.log.opened(phase)
        if found is not None:
            phase.load(self.checkpoints.load(found), position)
            is_due = position.phase_over or phase.is_due(self.recipe.evaluation.every)
            if is_due and self.evaluations.is_missing(position):
                self.evaluations.make(phase)
        self.log.phase_start(phase, enters=found is None or position.phase_over)
        return phase

    # ------------------------------------------------------------------------------------------------------------ the loop

    def train_phase(self, phase: PhaseState) -> bool:
        """Trains to the phase's end (returns True), or until all ranks have agreed to stop (returns False)."""
        position = phase.position
        if position.step == 0:
            self.evaluations.make(phase, name="before")
        batches = iter(phase.loader)
        phase.restart_clock()
        while True:
            reached = self.step(phase, batches)
            stop = self.stopping.should_stop(position.step)
            end = phase_end_reason(
                position.samples_seen, limit=phase.limit, total=self.rate.total, reached_delta=reached
            )
            if position.step % self.recipe.logging.every == 0 or end:
                self.log.metrics(phase)
                phase.meter.clear()
                phase.restart_clock()
                self.check_images(phase)
            if end:
                self.end_phase(phase, end)
                return True
            if stop:
                self.save(phase, "stop")
                self.checkpoints.wait()
                return False
            # nothing is saved between non-finite steps: if they stop the run, it resumes from before them
            if phase.is_due(self.recipe.checkpoint.every) and not phase.nonfinite_in_row:
                self.save(phase, "interval")
            if phase.is_due(self.recipe.evaluation.every):
                self.evaluations.make(phase)

    def step(self, phase: PhaseState, batches: Iterator[Batch]) -> bool:
        """Trains on one global batch. Returns whether the phase has reached its cosine (CSS)."""
        method, engine, position = phase.method, phase.engine, phase.position
        faults.point("loop.step", rank=self.world.rank, step=position.step)
        now = phase.now()
        method.begin_step(now, phase.global_labels())
        engine.train(held=phase.trains_head_only)
        phase.health.begin_step(position.step)
        if position.samples_seen == phase.head_only_until > 0:
            self.log.event(phase, "unfreeze")
        outputs, served = [], []
        for number in range(phase.accumulation):
            self.heartbeat.beat(position.step, "data")
            batch = next(batches)
            served.append((batch.sample_ids.numpy(), batch.bad_rows))
            self.heartbeat.beat(position.step, "forward and backward")
            outputs.append(self.train_micro_batch(phase, batch, now, number))
        loss = method.global_loss(torch.stack([output.loss for output in outputs]).mean())
        self.heartbeat.beat(position.step, "update")
        phase.health.before_update()
        norm = engine.step(now.lr, loss, weight_decay=self.recipe.optimizer.weight_decay_at(now.progress))
        finite = not engine.skipped
        phase.health.end_step(norm, now.lr, finite=finite)
        if finite:
            phase.finish_step(now)
        else:
            self.skip_step(phase, loss, norm, outputs)
        phase.count(served, finite=finite)
        position.step += 1
        position.samples_seen += phase.section.global_batch
        self.log.bad_samples(phase)
        return finite and phase.observe(loss, outputs, norm)

    def train_micro_batch(self, phase: PhaseState, batch: Batch, now: StepInfo, number: int) -> LossOutput:
        """Forward and backward of this rank's micro-batch `number` in the step; returns what is kept of it."""
        # numbered through the global batch, so that dropout does not depend on the number of ranks
        in_step = self.world.rank * phase.accumulation + number
        torch.manual_seed(randomness.torch_seed(self.recipe.seed, "model", now.step, in_step))
        outputs = phase.engine(*phase.method.inputs(batch))
        if faults.point("loop.outputs", rank=self.world.rank, step=now.step) == "nan":
            outputs = tuple(o * math.nan for o in outputs) if isinstance(outputs, tuple) else outputs * math.nan
        output = phase.method.loss(outputs, batch, now)
        first = phase.position.stream + in_step * phase.section.micro_batch
        phase.health.micro_batch(batch, outputs, first, phase.accumulation)
        phase.engine.backward(output.loss)
        phase.health.end_micro_batch()
        return replace(output, loss=output.loss.detach())

    def skip_step(self, phase: PhaseState, loss: torch.Tensor, norm: torch.Tensor, outputs: list[LossOutput]) -> None:
        """Notes a step whose loss or gradient norm is not finite, and ends the run after too many in a row.

        Raises:
            RollBack: too many, and the recipe says to skip this stretch of data.
            UserError: too many.
        """
        phase.method.discard_step()
        phase.note_nonfinite()
        self.log.nonfinite(phase, {"loss": float(loss), "grad_norm": float(norm)}, outputs)
        if phase.nonfinite_in_row < IN_ROW:
            return
        position = phase.position
        if self.recipe.safety.rollback:
            raise RollBack(replace(position, samples_seen=position.samples_seen + phase.section.global_batch))
        phase.go_back()  # what is in memory is the state before them
        if position.step > max(0, phase.saved_step):
            self.save(phase, "nonfinite")
        self.checkpoints.wait()
        kept = "a checkpoint from before them is kept" if position.step else "nothing was learned before them"
        raise UserError(
            f"the loss was not finite in {phase.nonfinite_in_row} steps in a row from step {position.step}; {kept}, "
            f"{self.folder.path / FILE} names the samples of the first such steps. "
            "Lower optimizer.lr, lengthen schedule.warmup, or set safety.rollback=true to skip this stretch of data"
        )

    def check_images(self, phase: PhaseState) -> None:
        """Raises UserError where more images could not be decoded than the recipe allows. A collective."""
        bad, seen = self.log.served(phase)
        limit = self.recipe.data.max_bad_fraction
        if seen >= 1000 and bad > limit * seen:
            raise UserError(
                f"{bad} of {seen} images could not be decoded, more than data.max_bad_fraction={limit}; "
                f"see {self.folder.path}/events.jsonl, and run tools/verify_dataset.py on the dataset"
            )

    # -------------------------------------------------------------------------------------------------- saving, evaluating

    def save(self, phase: PhaseState, reason: str) -> None:
        """Writes a checkpoint, unless this step has one."""
        position = phase.position
        if phase.saved_step == position.step and not position.phase_over:
            return
        started = time.perf_counter()
        state = phase.state()
        keep, name = position.phase_over, phase.section.name
        self.checkpoints.save(position.step, position.samples_seen, name, state, phase.meta(), keep=keep)
        for commit in self.checkpoints.finished():
            self.stopping.saved(commit.seconds)
        phase.saved_step = position.step
        self.log.event(phase, "checkpoint", reason=reason, stall_seconds=round(time.perf_counter() - started, 3))

    def end_phase(self, phase: PhaseState, reason: str) -> None:
        """The checkpoint of the phase's end, from which the next one begins, and its evaluation."""
        position = phase.position
        position.phase_over = True
        self.log.phase_end(phase, reason)
        self.save(phase, "phase_end")
        self.checkpoints.wait()
        if self.evaluations.is_last(position):
            self.log.last_epoch(phase)
        self.evaluations.make(phase)

    def _evaluate_again(self, found: CheckpointInfo, position: Position) -> None:
        """Makes the missed evaluation of a run that has nothing left to train."""
        phase = PhaseState(self.setup, self.rate, replace(position), fresh=False)
        try:
            phase.load(self.checkpoints.load(found), position)
            self.evaluations.make(phase)
        finally:
            phase.close()

    def _complete(self, position: Position) -> str | None:
        return what_is_complete(position, self.recipe.phases, total=self.rate.total, only_phase=self.only_phase)

    def _outcome(self, verdict: Verdict, step: int, phase: str | None, reason: str) -> Outcome:
        return Outcome(verdict, phase, step, reason, self.folder.attempt)


def _make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # with warn_only, torch would leave attention's backward as it is
    torch.backends.cudnn.benchmark = False
