"""The one training loop, for every method: load, next batch, forward, loss, backward, step, log, save, maybe stop.

A phase is built, restored from the newest checkpoint and run; its end writes a checkpoint, and the next phase is built from that one. So going
from phase to phase, being pre-empted and coming back, and changing the number of GPUs are one path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lvtrain import randomness
from lvtrain import world as worlds
from lvtrain.data import Loader
from lvtrain.errors import UserError
from lvtrain.evaluation import run_benchmarks
from lvtrain.methods import Now, create_method
from lvtrain.training import faults
from lvtrain.training.checkpoint import Checkpoints, Found
from lvtrain.training.ema import Average
from lvtrain.training.engine import Engine
from lvtrain.training.heartbeat import Heartbeat
from lvtrain.training.initial import start_weights
from lvtrain.training.outcome import Verdict
from lvtrain.training.phases import CosineStage, PhasePlan, phase_end_reason, plan_phase
from lvtrain.training.position import Position
from lvtrain.training.preemption import Preemption
from lvtrain.training.run import Run
from lvtrain.training.schedule import LearningRate, learning_rate
from lvtrain.training.telemetry import Telemetry, progress_line


class RollBack(Exception):
    """Too many non-finite steps in a row, and the recipe asks to go on from the last checkpoint past the stretch of data that did it."""

    def __init__(self, position: Position) -> None:
        self.position = position


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
    telemetry.event(
        "resume" if found else "start",
        step=position.step,
        samples_seen=position.samples_seen,
        world_size=run.world.size,
        attempt=run.attempt,
    )
    phases = run.recipe.phases
    rate = learning_rate(
        run.recipe.schedule, run.recipe.optimizer.lr, phases=phases, samples_per_epoch=len(run.dataset)
    )
    data_skip = position.data_skip
    while True:
        index = position.phase_index + int(position.phase_over)
        if index >= len(phases) or (position.phase_over and position.samples_seen >= rate.total):
            return Ending("done", position.step, only_phase, "the schedule is complete")
        if only_phase is not None and phases[index].name != only_phase:
            _check_order(run, only_phase, index)
            return Ending("done", position.step, only_phase, f"phase {only_phase} is complete")
        phase = _PhaseRun(run, checkpoints, telemetry, preemption, heart, rate, position, found, data_skip)
        try:
            if not phase.run():
                return Ending("requeue", phase.position.step, phases[index].name, preemption.reason or "asked to stop")
        except RollBack as back:
            found = checkpoints.newest()
            if found is None:
                raise UserError(
                    "the loss is not finite and there is no checkpoint to go back to; lower optimizer.lr or lengthen schedule.warmup"
                ) from back
            position = Position(**found.meta["position"])
            data_skip = back.position.stream - position.samples_seen
            telemetry.event("rollback", step=back.position.step, to_step=position.step, data_skip=data_skip)
            telemetry.forget_after(position.step)
            continue
        finally:
            phase.close()
        found = checkpoints.newest()
        if found is None:
            raise UserError(
                f"the checkpoint of phase {phases[index].name}'s end has vanished from {run.folder}/checkpoints"
            )
        position = Position(**found.meta["position"])
        data_skip = position.data_skip


def _check_order(run: Run, only_phase: str, next_index: int) -> None:
    names = [phase.name for phase in run.recipe.phases]
    if names.index(only_phase) > next_index:
        raise UserError(f"phase {only_phase} cannot start: {names[next_index]} is not finished in {run.folder}")


class _PhaseRun:
    """One phase, built for this world size and restored from a checkpoint (of this phase, or of the end of the one before)."""

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        telemetry: Telemetry,
        preemption: Preemption,
        heart: Heartbeat,
        rate: LearningRate,
        position: Position,
        found: Found | None,
        data_skip: int,
    ) -> None:
        self.r, self.checkpoints, self.telemetry, self.preemption, self.heart, self.rate = (
            run,
            checkpoints,
            telemetry,
            preemption,
            heart,
            rate,
        )
        recipe, world = run.recipe, run.world
        entering = found is None or position.phase_over
        restored_phase = recipe.phases[position.phase_index]
        self.position = position.next_phase() if position.phase_over else Position(**position.to_dict())
        self.position.data_skip = data_skip
        phase = recipe.phases[self.position.phase_index]
        self.plan: PhasePlan = plan_phase(
            phase,
            self.position.phase_index,
            start_step=self.position.phase_start_step,
            start_samples=self.position.phase_start_samples,
            total=rate.total,
            samples_per_epoch=len(run.dataset),
        )
        self.phase = phase
        self.accumulation = phase.virtual_batches // world.size

        self.method = create_method(recipe, num_classes=run.num_classes, device=world.device)
        if found is None:
            told = start_weights(recipe, self.method)
            if told:
                telemetry.event("init_from", **told)
        self.average = Average(self.method.evaluated(), recipe.ema.decay) if recipe.ema else None
        reader = checkpoints.load(found) if found else None
        self.engine = Engine(
            self.method.module,
            ds_config=run.ds_config,
            micro_batch=phase.micro_batch,
            accumulation=self.accumulation,
            optimizer=recipe.optimizer,
            device=world.device,
        )
        # a phase is entered as it was left, restored, and only then moved on: what the next phase adds is not in the checkpoint
        self.method.enter_phase(restored_phase, first_time=found is None)
        if reader is not None:
            self.engine.import_state(reader)
            self.method.load_state(reader)
            if self.average:
                self.average.load_state(reader)
            reader.finish()
        if entering and found is not None:
            self.method.enter_phase(phase, first_time=True)
        self.stage = CosineStage(phase.end.cos2, getattr(recipe.method, "window", recipe.logging.every), world.device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        self.loss_count = 0
        if found is not None and not entering:
            self.stage.load_state(found.meta["stage"])
            self.loss_sum.fill_(found.meta["loss_sum"])
            self.loss_count = found.meta["loss_count"]
        self.saved_step = self.position.step if found and not entering else -1
        self.nonfinite_in_row = self.nonfinite_total = 0
        self.loader = Loader(
            run.dataset,
            seed=recipe.seed,
            block=recipe.data.block,
            micro_batch=phase.micro_batch,
            virtual_batches=phase.virtual_batches,
            rank=world.rank,
            size=world.size,
            start=self.position.stream,
            augmentation=recipe.data.augmentation,
            device=world.device,
            backend=recipe.data.backend,
            threads=recipe.data.threads,
            prefetch=recipe.data.prefetch,
            image_size=recipe.backbone.image_size,
            warn=telemetry.say,
        )
        if entering:
            self._event("phase_start", phase=phase.name, world_size=world.size, accumulation=self.accumulation)

    # ------------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> bool:
        """Trains to the phase's end (True) or to a requested stop (False)."""
        if self.position.step == 0:
            self.evaluate("before")
        batches = iter(self.loader)
        self._start_clock()
        while True:
            reached = self.step(batches)
            stop = self.preemption.should_stop(self.position.step)
            reason = phase_end_reason(
                self.plan, self.position.samples_seen, reached_delta=reached, total=self.rate.total
            )
            if self.position.step % self.r.recipe.logging.every == 0 or reason:
                self.log()
                self._check_bad_samples()
            if reason:
                self.finish(reason)
                return True
            if stop:
                self.save("stop")
                self.checkpoints.wait()
                return False
            # amid steps that are not finite nothing is committed: if they stop the run, it goes on from before them
            if self._due(self.r.recipe.checkpoint.every) and not self.nonfinite_in_row:
                self.save("interval")
            if self._due(self.r.recipe.evaluation.every):
                self.evaluate(f"step_{self.position.step:09d}")

    def step(self, batches: Any) -> bool:
        """One step on the global batch; True when CSS says the phase has reached its cosine."""
        position, phase = self.position, self.phase
        faults.point("loop.step", rank=self.r.world.rank, step=position.step)
        lr = self.rate.at(position.samples_seen, phase.global_batch)
        labels = torch.from_numpy(self.loader.global_labels(position.stream, phase.global_batch))
        now = Now(position.step, lr, position.samples_seen / self.rate.total, position.stream / len(self.r.dataset))
        self.method.begin_step(now, labels)
        self.engine.train()
        losses, cos2 = [], []
        for micro in range(self.accumulation):
            self.heart.beat(position.step, "data")
            batch = next(batches)
            self.heart.beat(position.step, "forward and backward")
            virtual = self.r.world.rank * self.accumulation + micro
            torch.manual_seed(randomness.torch_seed(self.r.recipe.seed, "model", position.step, virtual))
            now = replace(now, micro=micro, virtual=virtual)
            outputs = self.engine(*self.method.inputs(batch))
            if faults.point("loop.outputs", rank=self.r.world.rank, step=position.step) == "nan":
                outputs = outputs * float("nan")
            output = self.method.loss(outputs, batch, now)
            self.engine.backward(output.loss)
            losses.append(output.loss.detach())
            if "cos2" in output.metrics:
                cos2.append(output.metrics["cos2"].detach())
        self.metrics = {name: value for name, value in output.metrics.items() if name != "cos2"}
        loss = self.method.global_loss(torch.stack(losses).mean())
        # On a GPU the host waits here for the forward only: the backward is already queued behind it.
        finite = math.isfinite(float(loss))
        self.heart.beat(position.step, "update")
        if finite:
            self.grad_norm = self.engine.step(lr)
            finite = not self.engine.skipped
        if finite:
            self.engine.sync_batch_statistics()
            self.method.end_step(now, self.engine.full_parameters)
            if self.average:
                with self.engine.full_parameters():
                    self.average.update(self.method.evaluated())
            self.nonfinite_in_row = 0
        else:
            self._skip()
        self.lr, position.step, position.samples_seen = (
            lr,
            position.step + 1,
            position.samples_seen + phase.global_batch,
        )
        for sample in self.loader.bad_samples:
            self.telemetry.event("bad_sample", any_rank=True, step=position.step, **asdict(sample))
        self.loader.bad_samples.clear()
        if not finite:
            return False
        self.loss_sum += loss
        self.loss_count += 1
        self.cos2 = torch.stack(cos2).mean() if cos2 else None
        return self.cos2 is not None and self.stage.observe(self.cos2)

    def _skip(self) -> None:
        self.engine.discard_gradients()
        self.method.discard_step()
        self.nonfinite_in_row += 1
        self.nonfinite_total += 1
        self._event("nonfinite", in_row=self.nonfinite_in_row)
        if self.nonfinite_in_row < self.r.recipe.safety.max_nonfinite:
            return
        if self.r.recipe.safety.rollback:
            after = Position(**self.position.to_dict())
            after.samples_seen += self.phase.global_batch
            raise RollBack(after)
        # nothing was learned since the first of them: what is in memory is the state before them
        back = self.nonfinite_in_row - 1
        self.position.step -= back
        self.position.samples_seen -= back * self.phase.global_batch
        if self.position.step > max(0, self.saved_step):
            self.save("nonfinite")
        self.checkpoints.wait()
        raise UserError(
            f"the loss was not finite in {self.nonfinite_in_row} steps in a row from step {self.position.step}; a checkpoint from before them is kept. "
            "Lower optimizer.lr, lengthen schedule.warmup, or set safety.rollback=true to skip this stretch of data"
        )

    def _check_bad_samples(self) -> None:
        """Agreed by all ranks, at every log line: each decodes its own samples."""
        limit = self.r.recipe.data.max_bad_fraction
        counts = worlds.gather_objects((self.loader.bad_count, self.loader.seen_count))
        bad, seen = (sum(column) for column in zip(*counts))
        if seen >= 1000 and bad > limit * seen:
            raise UserError(
                f"{bad} of {seen} samples could not be decoded, more than data.max_bad_fraction={limit}; "
                f"see {self.r.folder}/events.jsonl, and run tools/verify_dataset.py on the dataset"
            )

    # --------------------------------------------------------------------------------------------- saving, evaluating, telling

    def save(self, why: str) -> None:
        if self.saved_step == self.position.step and not self.position.phase_over:
            return
        started = time.perf_counter()
        world = self.r.world
        state = self.engine.export_state(keep=lambda i: i % world.size == world.rank) | self.method.state()
        if self.average:
            state |= self.average.state()
        meta = {
            "position": self.position.to_dict(),
            "stage": self.stage.state(),
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
            "num_classes": self.r.num_classes,
            "world_size": world.size,
        }
        keep = self.position.phase_over
        self.checkpoints.save(self.position.step, self.position.samples_seen, self.phase.name, state, meta, keep=keep)
        for commit in self.checkpoints.finished():
            self.preemption.saved(commit.seconds)
        self.saved_step = self.position.step
        self._event("checkpoint", reason=why, stall_seconds=round(time.perf_counter() - started, 3))

    def finish(self, reason: str) -> None:
        self.position.phase_over = True
        self._event("phase_end", reason=reason, cos2_window=self.stage.last_mean)
        self.save("phase_end")
        self.checkpoints.wait()
        last = self.plan.index + 1 == len(self.r.recipe.phases) or self.position.samples_seen >= self.rate.total
        self.evaluate("final" if last else f"step_{self.position.step:09d}")

    def evaluate(self, name: str) -> None:
        section = self.r.recipe.evaluation
        if not section.benchmarks:
            return
        results: dict[str, Any] = {
            "step": self.position.step,
            "samples_seen": self.position.samples_seen,
            "phase": self.phase.name,
        }
        arguments: dict[str, Any] = {
            "world": self.r.world,
            "batch": section.batch,
            "device": self.r.world.device,
            "image_size": self.r.recipe.backbone.image_size,
        }
        self.engine.eval()
        with self.engine.full_parameters(), torch.no_grad():
            results["benchmarks"] = run_benchmarks(
                self.engine.autocast(self.method.evaluated()), section.benchmarks, **arguments
            )
            if self.average:
                results["benchmarks_ema"] = run_benchmarks(
                    self._forward(self.average.module.eval()), section.benchmarks, **arguments
                )
        self.telemetry.evaluation(name, results, self.position.step)
        for benchmark, figures in results["benchmarks"].items():
            self.telemetry.say(
                f"evaluation {name}  {benchmark}: accuracy {100 * figures['accuracy']:.2f}% +- {100 * figures['std']:.2f}"
            )
        self._event("evaluation", name=name, accuracy={b: f["accuracy"] for b, f in results["benchmarks"].items()})
        self._start_clock()

    def _forward(self, module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        enabled = self.r.recipe.optimizer.precision == "bfloat16"

        def forward(images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.r.world.device.type, torch.bfloat16, enabled=enabled):
                embeddings: torch.Tensor = module(images)
            return embeddings.float()

        return forward

    def log(self) -> None:
        now, waited = time.perf_counter(), self.loader.wait_seconds
        steps = self.position.step - self._clock_step
        seconds = now - self._clock_time
        speed = steps * self.phase.global_batch / seconds
        loss = float(self.loss_sum) / max(1, self.loss_count)
        row = {
            "step": self.position.step,
            "samples_seen": self.position.samples_seen,
            "epoch": round(self.position.stream / len(self.r.dataset), 4),
            "phase": self.phase.name,
            "loss": loss,
            "cos2": float(self.cos2) if self.cos2 is not None else None,
            "cos2_window": self.stage.last_mean,
            "lr": self.lr,
            "grad_norm": float(self.grad_norm) if self.grad_norm is not None else None,
            **{name: float(value) for name, value in self.metrics.items()},
            "nonfinite": self.nonfinite_total,
            "images_per_second": round(speed, 2),
            "data_wait": round((waited - self._clock_waited) / seconds, 4),
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3)
            if self.r.world.device.type == "cuda"
            else None,
        }
        self.telemetry.metrics(row)
        for warning in self.method.warnings({name: float(value) for name, value in self.metrics.items()}):
            self._event("warning", text=warning)
            self.telemetry.say(f"warning: {warning}")
        left = (min(self.plan.last_samples, self.rate.total) - self.position.samples_seen) / speed
        self.telemetry.say(progress_line(row, phase=self.phase.name, seconds_left=left))
        self.loss_sum.zero_()
        self.loss_count = 0
        self._start_clock()

    def close(self) -> None:
        self.loader.close()
        self.engine.close()

    cos2: torch.Tensor | None = None
    grad_norm: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor]

    def _start_clock(self) -> None:
        self._clock_time, self._clock_step, self._clock_waited = (
            time.perf_counter(),
            self.position.step,
            self.loader.wait_seconds,
        )

    def _due(self, every: Any) -> bool:
        if every is None:
            return False
        length = every.samples(global_batch=self.phase.global_batch, samples_per_epoch=len(self.r.dataset))
        seen = self.position.samples_seen
        return seen // length > (seen - self.phase.global_batch) // length

    def _event(self, event: str, **fields: Any) -> None:
        common: dict[str, Any] = {"step": self.position.step, "samples_seen": self.position.samples_seen, "phase": self.phase.name}
        self.telemetry.event(event, **(common | fields))
