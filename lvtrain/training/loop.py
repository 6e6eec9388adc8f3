"""The one training loop, for every method: next batch, forward, loss, backward, step, log, save, evaluate, maybe stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from lvtrain import faults, randomness
from lvtrain.checkpoint.checkpoints import Checkpoints, Found
from lvtrain.distributed import world as worlds
from lvtrain.errors import UserError
from lvtrain.evaluation import run_benchmarks
from lvtrain.methods import Now
from lvtrain.training.built import Built
from lvtrain.training.heartbeat import Heartbeat
from lvtrain.training.meter import Pace
from lvtrain.training.nonfinite import FILE, note_batch
from lvtrain.training.phases import phase_end_reason
from lvtrain.training.position import Position
from lvtrain.training.preemption import Preemption
from lvtrain.training.run_folder import Run
from lvtrain.training.schedule import LearningRate
from lvtrain.training.telemetry import Telemetry, progress_line


class RollBack(Exception):
    """Too many non-finite steps in a row, and the recipe asks to go on from the last checkpoint past the stretch of data that did it."""

    def __init__(self, position: Position) -> None:
        self.position = position


class PhaseRun:
    """One phase from where it stands to its end, or to a stop that all ranks agreed on."""

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
        self.built = built = Built(run, checkpoints, telemetry, rate, position, found, data_skip)
        self.phase, self.plan, self.position, self.accumulation = (
            built.phase,
            built.plan,
            built.position,
            built.accumulation,
        )
        self.method, self.engine, self.average, self.loader = built.method, built.engine, built.average, built.loader
        self.stage, self.meter, self.pace = built.stage, built.meter, Pace()
        self.saved_step = -1 if built.entering else self.position.step
        self.nonfinite_in_row = self.nonfinite_total = self.bad_told = 0
        if built.entering:
            self._event("phase_start", phase=self.phase.name, world_size=run.world.size, accumulation=self.accumulation)

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
        losses, cos2, cosines, figures = [], [], [], []
        for micro in range(self.accumulation):
            self.heart.beat(position.step, "data")
            batch = next(batches)
            self.heart.beat(position.step, "forward and backward")
            virtual = self.r.world.rank * self.accumulation + micro
            torch.manual_seed(randomness.torch_seed(self.r.recipe.seed, "model", position.step, virtual))
            now = replace(now, micro=micro, virtual=virtual)
            outputs = self.engine(*self.method.inputs(batch))
            if faults.point("loop.outputs", rank=self.r.world.rank, step=position.step) == "nan":
                outputs = tuple(o * math.nan for o in outputs) if isinstance(outputs, tuple) else outputs * math.nan
            output = self.method.loss(outputs, batch, now)
            self.engine.backward(output.loss)
            losses.append(output.loss.detach())
            figures.append({name: value for name, value in output.metrics.items() if name != "cos2"})
            if "cos2" in output.metrics:
                cos2.append(output.metrics["cos2"].detach())
            if output.cosine is not None:
                cosines.append(output.cosine)
        loss = self.method.global_loss(torch.stack(losses).mean())
        self.heart.beat(position.step, "update")
        norm = self.engine.step(lr, loss, weight_decay=self.r.recipe.optimizer.weight_decay_at(now.progress))
        finite = not self.engine.skipped
        if finite:
            self.grad_norm = norm
            self.engine.sync_batch_statistics()
            self.method.end_step(now, self.engine.full_parameters)
            if self.average:
                with self.engine.full_parameters():
                    self.average.update(self.method.evaluated())
            self.nonfinite_in_row = 0
        else:
            self._skip(loss, norm, losses, cosines)
        self.now, position.step, position.samples_seen = (
            now,
            position.step + 1,
            position.samples_seen + phase.global_batch,
        )
        for sample in self.loader.bad_samples:
            self.telemetry.event("bad_sample", any_rank=True, step=position.step, **asdict(sample))
        self.loader.bad_samples.clear()
        if not finite:
            return False
        self.meter.add(loss, figures)
        self.cos2 = torch.stack(cos2).mean() if cos2 else None
        return self.cos2 is not None and self.stage.observe(self.cos2)

    def _skip(
        self, loss: torch.Tensor, norm: torch.Tensor, losses: list[torch.Tensor], cosines: list[torch.Tensor]
    ) -> None:
        self.method.discard_step()
        self.nonfinite_in_row += 1
        self.nonfinite_total += 1
        figures = {"loss": float(loss), "grad_norm": float(norm)}
        where = {
            "step": self.position.step,
            "phase": self.phase.name,
            "samples_seen": self.position.samples_seen,
            **figures,
        }
        noted, said = note_batch(self.r, self.loader, self.position.stream, losses, cosines, where)
        self._event("nonfinite", in_row=self.nonfinite_in_row, **noted)
        if said:
            told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
            self.telemetry.say(f"warning: step {self.position.step} is skipped, it was not finite ({told}); {said}")
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
        kept = "a checkpoint from before them is kept" if self.position.step else "nothing was learned before them"
        raise UserError(
            f"the loss was not finite in {self.nonfinite_in_row} steps in a row from step {self.position.step}; {kept}, "
            f"{self.r.folder / FILE} names the samples of the first such steps. "
            "Lower optimizer.lr, lengthen schedule.warmup, or set safety.rollback=true to skip this stretch of data"
        )

    def _check_bad_samples(self) -> None:
        """Agreed by all ranks, at every log line: each decodes its own samples."""
        limit = self.r.recipe.data.max_bad_fraction
        counts = worlds.gather_objects((self.loader.bad_count, self.loader.seen_count))
        bad, seen = (sum(column) for column in zip(*counts))
        if bad > self.bad_told:
            self.telemetry.say(
                f"warning: {bad} of {seen} samples could not be decoded so far and weigh nothing; events.jsonl names them"
            )
            self.bad_told = bad
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
        state = self.built.state(world.rank, world.size)
        meta = self.built.meta() | {"num_classes": self.r.num_classes, "world_size": world.size}
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
        steps_per_second, data_wait = self.pace.since(self.position.step, self.loader.wait_seconds)
        speed = steps_per_second * self.phase.global_batch
        loss, figures = self.meter.means()
        optimizer = self.r.recipe.optimizer
        row = {
            "step": self.position.step,
            "samples_seen": self.position.samples_seen,
            "epoch": round(self.position.stream / len(self.r.dataset), 4),
            "phase": self.phase.name,
            "loss": loss,
            "cos2": float(self.cos2) if self.cos2 is not None else None,
            "cos2_window": self.stage.last_mean,
            "lr": self.now.lr,
            "grad_norm": float(self.grad_norm) if self.grad_norm is not None else None,
            **(
                {"weight_decay": optimizer.weight_decay_at(self.now.progress)}
                if optimizer.weight_decay_end is not None
                else {}
            ),
            **figures,
            "nonfinite": self.nonfinite_total,
            "images_per_second": round(speed, 2),
            "data_wait": round(data_wait, 4),
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3)
            if self.r.world.device.type == "cuda"
            else None,
        }
        self.telemetry.metrics(row)
        for warning in self.method.warnings(row, self.now) if figures else []:
            self._event("warning", text=warning)
            self.telemetry.say(f"warning: {warning}")
        left = (min(self.plan.last_samples, self.rate.total) - self.position.samples_seen) / speed
        self.telemetry.say(progress_line(row, phase=self.phase.name, seconds_left=left))
        self.meter.clear()
        self._start_clock()

    cos2: torch.Tensor | None = None
    grad_norm: torch.Tensor | None = None

    def _start_clock(self) -> None:
        self.pace.start(self.position.step, self.loader.wait_seconds)

    def _due(self, every: Any) -> bool:
        if every is None:
            return False
        length = every.samples(global_batch=self.phase.global_batch, samples_per_epoch=len(self.r.dataset))
        seen = self.position.samples_seen
        return seen // length > (seen - self.phase.global_batch) // length

    def _event(self, event: str, **fields: Any) -> None:
        common: dict[str, Any] = {
            "step": self.position.step,
            "samples_seen": self.position.samples_seen,
            "phase": self.phase.name,
        }
        self.telemetry.event(event, **(common | fields))
