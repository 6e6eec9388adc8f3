"""The trainer: one start of a run, from phase to phase, step by step.

    train(recipe, ...)          opens the ranks and the run folder
      Trainer.run               writes `outcome.json`
        Trainer.train_phases    from the run's position to its end
          Trainer.train_phase   the loop: step, stop?, log, save, evaluate
            Trainer.step        one global batch

`Trainer` holds what exists once per start; `PhaseState` holds what exists once per phase.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from lvtrain import faults, randomness
from lvtrain.checkpoint.checkpoints import CheckpointInfo, Checkpoints
from lvtrain.checkpoint.lease import Fence, FolderInUse, hold
from lvtrain.classifier.kernel import choose_kernel, failure
from lvtrain.data import Batch, ShardDataset
from lvtrain.data.epochs import EpochCount, counts, epoch_line, unfinished
from lvtrain.distributed import world as worlds
from lvtrain.distributed.gpu import sees_only_its_own
from lvtrain.errors import UserError
from lvtrain.evaluation import suite
from lvtrain.health.causes import Finding
from lvtrain.health.curves import find_reference
from lvtrain.health.on_track import Note, OnTrack
from lvtrain.methods import LossOutput, StepInfo, method_title
from lvtrain.recipe.registry import METHODS
from lvtrain.recipe.sections import Recipe
from lvtrain.training import outcome as outcomes
from lvtrain.training.checks import check_benchmarks
from lvtrain.training.heartbeat import Heartbeat
from lvtrain.training.nonfinite import FILE, note_batch
from lvtrain.training.outcome import Outcome, Verdict
from lvtrain.training.phase_state import PhaseState, Setup
from lvtrain.training.run_folder import decide_micro_batches, keep_provenance, open_folder
from lvtrain.training.schedule import Position, learning_rate, phase_end_reason, rate_line, what_is_complete
from lvtrain.training.stopping import Stopping
from lvtrain.training.telemetry import Telemetry, progress_line
from lvtrain.training.trackers import TrackedRun

_STARTED = time.monotonic()
_NONFINITE_IN_ROW = 3  # steps that stop the run, or roll it back
_ROLLBACKS = 3  # to one checkpoint: what is not finite after that is not a stretch of bad data


class RollBack(Exception):
    """Too many non-finite steps in a row, and the recipe says to skip that stretch of data. `position` is after it."""

    def __init__(self, position: Position) -> None:
        self.position = position


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
    """What exists once per start: data, ranks, run folder, checkpoints, telemetry, stopping, heartbeat, schedule.

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
        self.kernel = choose_kernel(recipe.classifier.numerics.kernel, world.device) if recipe.classifier else None
        facts: dict[str, Any] = {"data_licence": dataset.manifest.licence, "classifier_kernel": self.kernel}
        facts |= {"identities": dataset.num_classes, "images": per_epoch}
        self.folder = open_folder(recipe, setup.ds_config, world, facts=facts, fence=fence)
        keep_provenance(self.folder.path, recipe, dataset, fence)
        tracked = TrackedRun(self.folder.path, self.folder.run_id, recipe.model_dump(mode="json"))
        self.telemetry = Telemetry(tracked, world, recipe.logging.trackers, fence)
        dataset.warn = self.telemetry.warn
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
        self.opened: dict[str, dict[str, str]] = {}
        self.on_track: OnTrack | None = None  # on rank 0, from `train_phases` on
        self.named: set[str] = set()  # causes that the health check has named

    # ------------------------------------------------------------------------------------------------- from phase to phase

    def run(self) -> Outcome:
        """Trains, and writes `outcome.json` unless this start crashes."""
        try:
            with self.heartbeat, self.stopping, self.checkpoints:
                outcome = self.train_phases()
            self._report_outcome(outcome)
            return outcome
        except FolderInUse:  # another job took the folder over: its events and its outcome are that job's
            raise
        except UserError as error:
            with contextlib.suppress(FolderInUse):  # rank 0 has written the same and left, or another job came
                self.telemetry.check_fence()
                self.telemetry.event("error", reason=str(error))
                fatal = self._outcome("fatal", outcomes.committed_step(self.folder.path), self.only_phase, str(error))
                outcomes.write(self.folder.path, fatal)  # by any rank: rank 0 may be waiting in a collective
            raise
        finally:
            self.telemetry.close()

    def train_phases(self) -> Outcome:
        """Trains from the run's position to its end, to the end of `only_phase`, or until asked to stop.

        Raises:
            UserError: there are checkpoints but none is valid; or too many bad images or non-finite steps.
        """
        found = self._first_checkpoint()
        position = _position_of(found) if found else Position()
        self.telemetry.begin(position.step)
        self._report_changes(position)
        if complete := self._complete(position):
            if found is not None and self._missed_evaluation(position):
                self._evaluate_again(found, position)
            reason = f"{complete} since an earlier start, so nothing is left to train"
            return self._outcome("done", position.step, self.only_phase, reason)
        self._report_start(found, position)
        if self.world.is_first:
            self.on_track = self._follow()
        rolled_back_to: list[int] = []
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
                position = _position_of(found)
            except RollBack as back:
                found, position = self.roll_back(back.position, rolled_back_to)
            finally:
                phase.close()
                # DeepSpeed's engine refers to itself; uncollected, these weights would stay beside those of the next phase
                del phase
                gc.collect()

    def open_phase(self, found: CheckpointInfo | None, position: Position) -> PhaseState:
        """Builds the phase that is trained next, from a checkpoint or, if there is none, from its first weights."""
        enters = found is None or position.phase_over
        start = position.next_phase() if position.phase_over else replace(position)
        phase = PhaseState(self.setup, self.rate, start, fresh=found is None)
        for what, facts in phase.opened.items():
            if self.opened.get(what) != facts:  # once, and not in every phase
                self.telemetry.event(what, **facts)
                self.telemetry.say(f"lvtrain: {what}: {facts['name']}")
        self.opened = phase.opened
        if phase.initial:
            self.telemetry.event("init_from", **phase.initial)
            taken = ", ".join(f"{name} {value}" for name, value in phase.initial.items() if value)
            self.telemetry.say(f"starting from {taken}")
        if found is not None:
            phase.load(self.checkpoints.load(found), position)
            is_due = position.phase_over or phase.is_due(self.recipe.evaluation.every)
            if is_due and (name := self._missed_evaluation(position)):
                self.evaluate(phase, name)
        self._name(phase, phase.health.at_start())
        if enters:
            self._event(phase, "phase_start", world_size=self.world.size, accumulation=phase.accumulation)
        if self.on_track:
            notes = self.on_track.phase_started(phase.section.name, phase.section.end.cos2)
            self._note(phase, notes if enters else [])
        return phase

    def roll_back(self, after: Position, rolled_back_to: list[int]) -> tuple[CheckpointInfo, Position]:
        """The newest checkpoint, and its position moved past the stretch of data that was not finite.

        Args:
            after: where that stretch ends.
            rolled_back_to: steps of the roll-backs so far; this one is added.

        Raises:
            UserError: there is no checkpoint, or going back to it has not helped.
        """
        found = self.checkpoints.newest()
        if found is None:
            raise UserError(
                "the loss is not finite and there is no checkpoint to go back to; lower optimizer.lr or lengthen schedule.warmup"
            )
        if rolled_back_to.count(found.step) == _ROLLBACKS:
            raise UserError(
                f"the loss is not finite whatever data is skipped: {_ROLLBACKS} roll-backs to step {found.step} did not get past it; "
                "lower optimizer.lr, or resume from an earlier checkpoint by removing later ones"
            )
        rolled_back_to.append(found.step)
        stored = _position_of(found)
        position = replace(stored, data_skip=after.stream - stored.samples_seen)
        self.telemetry.event("rollback", step=after.step, to_step=position.step, data_skip=position.data_skip)
        self.telemetry.begin(position.step)
        return found, position

    # ------------------------------------------------------------------------------------------------------------ the loop

    def train_phase(self, phase: PhaseState) -> bool:
        """Trains to the phase's end (returns True), or until all ranks have agreed to stop (returns False)."""
        position = phase.position
        if position.step == 0:
            self.evaluate(phase, "before")
        batches = iter(phase.loader)
        phase.restart_clock()
        while True:
            reached = self.step(phase, batches)
            stop = self.stopping.should_stop(position.step)
            end = phase_end_reason(
                position.samples_seen, limit=phase.limit, total=self.rate.total, reached_delta=reached
            )
            if position.step % self.recipe.logging.every == 0 or end:
                self.log(phase)
                self._check_data(phase)
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
                self.evaluate(phase, self._evaluation_name(position))

    def step(self, phase: PhaseState, batches: Iterator[Batch]) -> bool:
        """Trains on one global batch. Returns whether the phase has reached its cosine (CSS)."""
        method, engine, position = phase.method, phase.engine, phase.position
        faults.point("loop.step", rank=self.world.rank, step=position.step)
        now = phase.now()
        method.begin_step(now, phase.global_labels())
        engine.train(held=phase.trains_head_only)
        phase.health.begin_step(position.step)
        if position.samples_seen == phase.head_only_until > 0:
            self._event(phase, "unfreeze")
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
        self._report_bad_samples(phase)
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
        position, figures = phase.position, {"loss": float(loss), "grad_norm": float(norm)}
        if self.world.is_first:
            self.telemetry.check_fence()
        noted, said = note_batch(self.folder.path, phase.loader, position.stream, outputs, phase.place() | figures)
        self._event(phase, "nonfinite", in_row=phase.nonfinite_in_row, **noted)
        if said:
            values = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
            self.telemetry.say(f"warning: step {position.step} is skipped, it was not finite ({values}); {said}")
        if phase.nonfinite_in_row < _NONFINITE_IN_ROW:
            return
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

    # ------------------------------------------------------------------------------------------ saving, evaluating, reporting

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
        self._event(phase, "checkpoint", reason=reason, stall_seconds=round(time.perf_counter() - started, 3))

    def end_phase(self, phase: PhaseState, reason: str) -> None:
        """The checkpoint of the phase's end, from which the next one begins, and its evaluation."""
        position = phase.position
        position.phase_over = True
        self._event(phase, "phase_end", reason=reason, cos2_window=phase.stage.last_mean)
        if self.on_track:
            self._note(phase, self.on_track.phase_ended(phase.now().epoch, reason))
        self.save(phase, "phase_end")
        self.checkpoints.wait()
        name = self._evaluation_name(position)
        if name == "final":
            rest = worlds.gather_objects(phase.tally.sums)
            self._report_epochs(phase, unfinished(rest, len(self.setup.dataset)))
        self.evaluate(phase, name)

    def evaluate(self, phase: PhaseState, name: str) -> None:
        """Runs the recipe's benchmarks, if there are any, on the weights and on their average. A collective."""
        if not self.recipe.evaluation.benchmarks:
            return
        results = phase.evaluate()
        self.telemetry.evaluation(name, results)
        figures = {benchmark: suite.figure(result) for benchmark, result in results["benchmarks"].items()}
        self._event(phase, "evaluation", name=name, figures=figures)
        phase.restart_clock()

    def _evaluation_name(self, position: Position) -> str:
        """The evaluation at `position`: `final` where the run is over, otherwise by the step."""
        over = position.next_index == len(self.recipe.phases) or position.samples_seen >= self.rate.total
        return "final" if position.phase_over and over else f"step_{position.step:09d}"

    def _missed_evaluation(self, position: Position) -> str | None:
        """The name of the evaluation at `position`, where an earlier start was killed before it was written."""
        name = self._evaluation_name(position)
        path = self.folder.path / "evaluation" / f"{name}.json"
        missed = bool(self.recipe.evaluation.benchmarks) and not worlds.on_first(path.exists)
        return name if missed else None

    def _evaluate_again(self, found: CheckpointInfo, position: Position) -> None:
        """Makes the missed evaluation of a run that has nothing left to train."""
        phase = PhaseState(self.setup, self.rate, replace(position), fresh=False)
        try:
            phase.load(self.checkpoints.load(found), position)
            self.evaluate(phase, self._evaluation_name(position))
        finally:
            phase.close()

    def log(self, phase: PhaseState) -> None:
        """One row of metrics and one line on the console. A collective."""
        row = phase.metrics_row()
        if self.on_track:
            row |= self.on_track.columns(row["epoch"])
        self.telemetry.metrics(row)
        self._name(phase, phase.health.read(row))
        has_figures = row["loss"] is not None
        for warning in phase.method.warnings(row, phase.now(steps_back=1)) if has_figures else []:
            self._event(phase, "warning", text=warning)
            self.telemetry.say(f"warning: {warning}")
        left = (min(phase.limit, self.rate.total) - phase.position.samples_seen) / max(row["images_per_second"], 0.01)
        self.telemetry.say(progress_line(row, phase=phase.section.name, seconds_left=left))
        if self.on_track:
            first, phase.first_loss = phase.first_loss, None
            notes = self.on_track.first_loss(float(first)) if first is not None else []
            self._note(phase, notes + self.on_track.add(row))
        phase.meter.clear()
        phase.restart_clock()

    def _follow(self) -> OnTrack:
        """What follows the run's loss, with what is known of such a run. On rank 0."""
        recipe, dataset = self.recipe, self.setup.dataset
        try:
            law = METHODS.get(recipe.method.name).first_loss(recipe, num_classes=dataset.num_classes)
        except Exception as error:  # of a margin or method that is not ours; a check does not stop a run
            law = f"the law failed ({type(error).__name__}: {error})"
        reference = find_reference(recipe, num_classes=dataset.num_classes, num_samples=len(dataset))
        found = OnTrack(law, reference, self.folder.path)
        for note in found.start():
            self.telemetry.event(note.event, **note.fields)
            self.telemetry.say(f"lvtrain: {note.text}")
        return found

    def _note(self, phase: PhaseState, notes: list[Note]) -> None:
        for note in notes:
            self._event(phase, note.event, **note.fields)
            self.telemetry.say(f"{'warning' if note.is_warning else 'lvtrain'}: {note.text}")

    def _name(self, phase: PhaseState, findings: list[Finding]) -> None:
        """Reports causes that the health check names, each once a start."""
        for found in findings:
            if found.cause not in self.named:
                self.named.add(found.cause)
                self._event(phase, "health", cause=found.cause, text=found.text, warning=found.is_warning)
                self.telemetry.say(f"{'warning' if found.is_warning else 'lvtrain'}: {found.text}")

    def _check_data(self, phase: PhaseState) -> None:
        """Checks the served images at every log line: how many are bad, and the count of a finished epoch.

        A collective, because each rank decodes and counts its own images.
        """
        limit, loader = self.recipe.data.max_bad_fraction, phase.loader
        answers = worlds.gather_objects((loader.bad_count, loader.seen_count, phase.tally.ended(phase.position.stream)))
        bad, seen = sum(answer[0] for answer in answers), sum(answer[1] for answer in answers)
        ended = [part for _, _, part in answers if part is not None]
        self._report_epochs(phase, counts(ended, len(self.setup.dataset)))
        if bad > phase.bad_reported:
            self.telemetry.say(
                f"warning: {bad} of {seen} images could not be decoded so far and are skipped; events.jsonl lists them"
            )
            phase.bad_reported = bad
        if seen >= 1000 and bad > limit * seen:
            raise UserError(
                f"{bad} of {seen} images could not be decoded, more than data.max_bad_fraction={limit}; "
                f"see {self.folder.path}/events.jsonl, and run tools/verify_dataset.py on the dataset"
            )

    def _report_epochs(self, phase: PhaseState, found: list[EpochCount]) -> None:
        for count in found:
            self._event(phase, "epoch", **asdict(count))
            self.telemetry.say(f"lvtrain: {epoch_line(count, self.world.size)}")

    def _report_bad_samples(self, phase: PhaseState) -> None:
        for sample in phase.loader.bad_samples:
            self.telemetry.event_of_rank("bad_sample", step=phase.position.step, **asdict(sample))
        phase.loader.bad_samples.clear()

    def _report_start(self, found: CheckpointInfo | None, position: Position) -> None:
        where: dict[str, Any] = {
            "step": position.step,
            "samples_seen": position.samples_seen,
            "world_size": self.world.size,
        }
        self.telemetry.event("resume" if found else "start", **where, attempt=self.folder.attempt)
        self.telemetry.say(f"lvtrain: method {method_title(self.recipe.method.name)}")
        self.telemetry.say(
            f"lvtrain: {'resuming' if found else 'starting'} {self.folder.path} at step {position.step}, phase "
            f"{self.recipe.phases[position.next_index].name}, number of ranks: {self.world.size} ({self.world.device.type})"
        )
        self.telemetry.say(f"lvtrain: {rate_line(self.recipe.optimizer, self.recipe.phases)}")

    def _report_changes(self, position: Position) -> None:
        """What this start changes in the recipe, with the step from which it counts and the number of the start."""
        for change in self.folder.changes:
            self.telemetry.event("recipe_changed", step=position.step, attempt=self.folder.attempt, change=change)
            self.telemetry.say(
                f"lvtrain: recipe changed at step {position.step}, start {self.folder.attempt}: {change}"
            )
        for change in self.folder.surroundings:
            self.telemetry.event("environment_changed", step=position.step, attempt=self.folder.attempt, change=change)
            self.telemetry.say(
                f"lvtrain: environment changed at step {position.step}, start {self.folder.attempt}: {change}"
            )
        self._report_kernel()
        if self.world.device.type == "cuda" and sees_only_its_own(self.world.local_rank, torch.cuda.device_count()):
            self.telemetry.warn(
                "sees only its own GPU, so NCCL may not use NVLink to the others of its node; start with --gpus-per-node, "
                "without --gpus-per-task"
            )

    def _report_kernel(self) -> None:
        """The classifier's kernel. Where `auto` could not take Triton's, each rank concerned prints the reason."""
        tested = self.recipe.classifier is not None and self.recipe.classifier.numerics.kernel == "auto"
        wrong = failure(self.world.device) if tested and self.world.device.type == "cuda" else None
        if wrong is not None:
            self.telemetry.event_of_rank("kernel_self_test", rank=self.world.rank, failed=wrong)
            self.telemetry.warn(f"the Triton kernels failed their self-test, so the torch path is used ({wrong})")
        if self.world.device.type == "cuda" and self.kernel:
            self.telemetry.say(f"lvtrain: classifier kernel: {self.kernel}")

    def _report_outcome(self, outcome: Outcome) -> None:
        done = outcome.outcome == "done"
        verdict = "done" if done else "stop"
        self.telemetry.event(verdict, step=outcome.step, phase=outcome.phase, reason=outcome.reason)
        folder = self.folder.path
        then = f"python tools/report.py {folder} shows it" if done else "start the same command again to resume"
        self.telemetry.say(f"lvtrain: {verdict} at step {outcome.step}: {outcome.reason}; run folder {folder}; {then}")
        if self.world.is_first:
            self.telemetry.check_fence()
            outcomes.write(folder, outcome)

    def _event(self, phase: PhaseState, event: str, **fields: Any) -> None:
        self.telemetry.event(event, **(phase.place() | fields))

    def _first_checkpoint(self) -> CheckpointInfo | None:
        """The checkpoint to resume from, as `checkpoint.resume` allows."""
        found, resume = self.checkpoints.newest(), self.recipe.checkpoint.resume
        folder = self.folder.path
        if found is not None and resume == "never":
            raise UserError(f"checkpoint.resume=never but {folder} holds a run; choose another name=..., or remove it")
        if found is None and resume == "must":
            raise UserError(
                f"checkpoint.resume=must but {folder}/checkpoints holds no checkpoint; start with resume=auto"
            )
        return found

    def _complete(self, position: Position) -> str | None:
        return what_is_complete(position, self.recipe.phases, total=self.rate.total, only_phase=self.only_phase)

    def _outcome(self, verdict: Verdict, step: int, phase: str | None, reason: str) -> Outcome:
        return Outcome(verdict, phase, step, reason, self.folder.attempt)


def _position_of(found: CheckpointInfo) -> Position:
    header = {"step": found.step, "samples_seen": found.samples_seen}  # repeated in checkpoints of version 1
    return Position(**(found.meta["position"] | header))


def _make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # with warn_only, torch would leave attention's backward as it is
    torch.backends.cudnn.benchmark = False
