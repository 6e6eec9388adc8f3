"""What a phase trains with: method, engine, averaged weights, loader, stage, meter and position.

A phase is built when it starts and at every start of the run, for the present number of ranks. It then begins, or loads
a checkpoint. So the next phase, a resume and another number of GPUs use the same code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn

from lvtrain.checkpoint.reader import Reader
from lvtrain.checkpoint.state import Replicated, State
from lvtrain.classifier import sampling
from lvtrain.data import Loader, ShardDataset
from lvtrain.data.augment import View, augmentation
from lvtrain.data.epochs import EpochSums, EpochTally
from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.engine.engine import Engine
from lvtrain.health.check import HealthCheck
from lvtrain.methods import LossOutput, StepInfo, create_method
from lvtrain.recipe.base import Duration
from lvtrain.recipe.sections import Recipe
from lvtrain.training.initial import start_weights
from lvtrain.training.meter import Meter, Pace
from lvtrain.training.schedule import CosineStage, LearningRate, Position, phase_limit


@dataclass(frozen=True)
class Setup:
    """What a start trains with, the same in every phase.

    Attributes:
        recipe: resolved.
        ds_config: DeepSpeed's settings, resolved.
        dataset: opened in this process.
        world: this process among the ranks.
    """

    recipe: Recipe
    ds_config: dict[str, Any]
    dataset: ShardDataset
    world: World


_IN_MANIFEST = ("step", "samples_seen")  # the numbers of a position that a checkpoint's manifest has


class AveragedWeights:
    """An exponential moving average of the evaluated module's weights and buffers, by timm.

    Build it before the engine partitions the module (ZeRO-3). Call `update` where the weights are whole.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._ema = ModelEmaV3(module, decay=decay)

    @property
    def module(self) -> nn.Module:
        return self._ema.module

    def update(self, module: nn.Module) -> None:
        with torch.no_grad():
            self._ema.update(module)

    def state(self) -> State:
        return {f"ema.{name}": Replicated(tensor) for name, tensor in self.module.state_dict().items()}

    def load_state(self, reader: Any) -> None:
        self.module.load_state_dict({name: reader.replicated(f"ema.{name}") for name in self.module.state_dict()})


class PhaseState:
    """The phase at `position`. Call `load` before training, unless the run begins here (`fresh`).

    Args:
        rate: of the run; its `total` bounds the phase.
        position: changed in place as the phase is trained.
        fresh: the run begins here, so `init_from` and the seed give the weights.

    Attributes:
        section: the recipe's section of this phase.
        limit: samples seen at the phase's latest end.
        accumulation: micro-batches of this rank per step.
        opened: files that the method read and every start needs, for `events.jsonl`.
        initial: weights that a fresh run loaded, for `events.jsonl`.
        saved_step: step of the newest checkpoint, -1 if there is none.
        nonfinite_in_row: steps in succession without a finite loss or gradient, up to the last one.
        nonfinite_total: all such steps since this object was built.
        tally: counts which images were served in each epoch.
        cos2: of the last finite step, a scalar on the device.
        grad_norm: likewise.
        first_loss: of the run's first step, a scalar on the device, until it is compared with what is expected.

    Raises:
        UserError: weights that do not fit the recipe.
    """

    def __init__(self, setup: Setup, rate: LearningRate, position: Position, *, fresh: bool) -> None:
        recipe, world, dataset = setup.recipe, setup.world, setup.dataset
        self.setup, self.rate, self.position = setup, rate, position
        self.section = section = recipe.phases[position.phase_index]
        self.limit = phase_limit(
            section, position.phase_start_samples, total=rate.total, samples_per_epoch=len(dataset)
        )
        self.accumulation = section.micro_batches // world.size
        self.saved_step = -1
        self.nonfinite_in_row = self.nonfinite_total = self.bad_reported = 0
        self.cos2: torch.Tensor | None = None
        self.grad_norm: torch.Tensor | None = None
        self.first_loss: torch.Tensor | None = None
        self.pace = Pace()

        self.method = create_method(recipe, num_classes=dataset.num_classes, device=world.device)
        self.opened = self.method.open_files()
        self.initial = start_weights(self.method, recipe, dataset, world) if fresh else {}
        self.average = AveragedWeights(self.method.evaluated(), recipe.ema.decay) if recipe.ema else None
        if recipe.backbone.compile:
            self.method.evaluated().compile()  # in place: names stay, and the averaged copy is not compiled
        self.engine = Engine(
            self.method.module,
            ds_config=setup.ds_config,
            micro_batch=section.micro_batch,
            accumulation=self.accumulation,
            optimizer=recipe.optimizer,
            device=world.device,
            still=self.method.still_parts(),
        )
        if fresh:
            self.method.enter_phase(section, first_time=True)
        self.stage = CosineStage(section.end.cos2, self.method.cos2_window, world.device)
        self.meter = Meter(world.device)
        views = self.method.served_views(augmentation(recipe.data.augmentation))
        self.loader = _create_loader(setup, section.micro_batch, section.micro_batches, position.stream, views)
        self.health = HealthCheck(recipe, dataset, world, self.loader.order, self.method, phase=position.phase_index)
        self.loader.on_read = self.health.files.add
        self.head_only_until = _head_only(recipe, len(dataset))
        self.tally = EpochTally(self.loader.order, world.rank, world.size, position.stream)
        self._tally_before: dict[int, EpochSums] = {}

    def now(self, steps_back: int = 0) -> StepInfo:
        """The step that is trained next, or an earlier one, as the method takes it."""
        batch, position = self.section.global_batch, self.position
        seen, stream = position.samples_seen - steps_back * batch, position.stream - steps_back * batch
        progress = seen / self.rate.total
        return StepInfo(
            position.step - steps_back, self.rate.at(seen, batch), progress, stream / len(self.setup.dataset)
        )

    @property
    def trains_head_only(self) -> bool:
        """Whether the next step trains the class centres alone; a function of the samples seen."""
        return self.position.samples_seen < self.head_only_until

    def global_labels(self) -> torch.Tensor:
        """Labels of the next step's whole global batch, int64 [G] on the host."""
        return torch.from_numpy(self.loader.global_labels(self.position.stream, self.section.global_batch))

    def finish_step(self, now: StepInfo) -> None:
        """After the engine's own update: BatchNorm's statistics, the method's class centres, the averaged weights."""
        self.engine.sync_batch_statistics()
        self.method.end_step(now, self.engine.full_parameters)
        if self.average and not self.engine.held:
            with self.engine.full_parameters():
                self.average.update(self.method.evaluated())
        self.nonfinite_in_row = 0

    def count(self, served: list[tuple[np.ndarray, tuple[int, ...]]], *, finite: bool) -> None:
        """Counts the images of a step. Call it before the position changes.

        Args:
            served: sample ids int64 [m] and rows that could not be decoded, of each micro-batch of this rank.
            finite: whether the step's loss was finite.
        """
        size = self.section.micro_batch
        first = self.position.stream + self.setup.world.rank * self.accumulation * size
        for number, (ids, bad_rows) in enumerate(served):
            self.tally.add(first + number * size, ids, bad_rows, finite=finite)

    def note_nonfinite(self) -> None:
        """Counts a step without a finite loss, which `go_back` may undo."""
        if not self.nonfinite_in_row:
            self._tally_before = self.tally.copy()
        self.nonfinite_in_row += 1
        self.nonfinite_total += 1

    def go_back(self) -> None:
        """Puts the position back to the first of the steps in a row without a finite loss. The weights have not changed since."""
        back = self.nonfinite_in_row - 1  # the last of them has not moved the position yet
        self.position.step -= back
        self.position.samples_seen -= back * self.section.global_batch
        self.tally.sums = self._tally_before

    def observe(self, loss: torch.Tensor, outputs: list[LossOutput], grad_norm: torch.Tensor) -> bool:
        """Measures a finished step. Returns whether the phase has reached its cosine (CSS).

        Args:
            loss: the step's, over all ranks, scalar.
            outputs: of this rank's micro-batches.
            grad_norm: of the backbone, over all ranks, scalar.
        """
        cos2 = [output.metrics["cos2"].detach() for output in outputs if "cos2" in output.metrics]
        self.cos2, self.grad_norm = torch.stack(cos2).mean() if cos2 else None, grad_norm
        if self.position.step == 1:
            self.first_loss = loss
        self.meter.add(loss, [{name: v for name, v in o.metrics.items() if name != "cos2"} for o in outputs])
        return self.cos2 is not None and self.stage.observe(self.cos2)

    def place(self) -> dict[str, Any]:
        """The phase's position, for events, metrics and evaluations."""
        position = self.position
        return {"step": position.step, "samples_seen": position.samples_seen, "phase": self.section.name}

    def is_due(self, every: Duration | None) -> bool:
        """Whether the last step has completed another `every` samples of the run."""
        if every is None:
            return False
        batch, seen = self.section.global_batch, self.position.samples_seen
        length = every.samples(global_batch=batch, samples_per_epoch=len(self.setup.dataset))
        return seen // length > (seen - batch) // length

    def state(self) -> State:
        """Every tensor that a resumed run needs, by name. A tensor that is equal on all ranks is divided among them. A collective."""
        rank, size = self.setup.world.rank, self.setup.world.size
        state = self.engine.export_state(keep=lambda i: i % size == rank) | self.method.state()
        return state | self.average.state() if self.average else state

    def meta(self) -> dict[str, Any]:
        """Further state of a resumed run, as JSON: numbers, and the recipe in case the run folder's is lost. A collective."""
        position = {name: value for name, value in asdict(self.position).items() if name not in _IN_MANIFEST}
        recipe = self.setup.recipe.model_dump(mode="json")
        return {
            "position": position,
            "stage": self.stage.state(),
            "meter": self.meter.state(),
            "epochs": self.tally.state(worlds.gather_objects(self.tally.sums)),
            "recipe": recipe,
            "class_sampling": sampling.RULE,
        }

    def load(self, reader: Reader, stored: Position) -> None:
        """Loads a checkpoint of this phase, or of the end of the phase before. A collective.

        Args:
            reader: an opened checkpoint.
            stored: the checkpoint's position.

        Raises:
            UserError: tensors that do not fit the recipe.
        """
        # the checkpoint lacks what this phase adds: enter the stored phase, restore it, and only then move on
        self.method.enter_phase(self.setup.recipe.phases[stored.phase_index], first_time=False)
        self.engine.import_state(reader)
        self.method.load_state(reader)
        if self.average:
            self.average.load_state(reader)
        reader.finish()
        self.saved_step = stored.step
        if "epochs" in reader.meta:  # checkpoints of earlier versions have none
            self.tally.load_state(reader.meta["epochs"])
            self.tally.skip(stored.samples_seen + reader.meta["position"]["data_skip"], stored.stream)
        if stored.phase_over:
            self.method.enter_phase(self.section, first_time=True)
        else:
            self.stage.load_state(reader.meta["stage"])
            self.meter.load_state(reader.meta["meter"])

    def metrics_row(self) -> dict[str, Any]:
        """What is logged of the steps since the meter was cleared. A collective."""
        recipe, position, last = self.setup.recipe, self.position, self.now(steps_back=1)
        steps_per_second, data_wait = self.pace.since(position.step, self.loader.wait_seconds)
        loss, figures = self.meter.means()
        row = self.place() | {
            "epoch": round(position.stream / len(self.setup.dataset), 4),
            "loss": loss,
            "cos2": float(self.cos2) if self.cos2 is not None else None,
            "cos2_window": self.stage.last_mean,
            "lr": last.lr,
            "grad_norm": float(self.grad_norm) if self.grad_norm is not None else None,
        }
        if recipe.optimizer.weight_decay_end is not None:
            row["weight_decay"] = recipe.optimizer.weight_decay_at(last.progress)
        on_gpu = self.setup.world.device.type == "cuda"
        return (
            row
            | figures
            | {
                "nonfinite": self.nonfinite_total,
                "images_per_second": round(steps_per_second * self.section.global_batch, 2),
                "data_wait": round(data_wait, 4),
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if on_gpu else None,
            }
        )

    def restart_clock(self) -> None:
        """Restarts the measurement of speed after something other than training took time."""
        self.pace.start(self.position.step, self.loader.wait_seconds)

    def close(self) -> None:
        self.loader.close()
        self.engine.close()


def _head_only(recipe: Recipe, samples_per_epoch: int) -> int:
    """Samples seen at the end of `init_from.head_only`; 0 without it."""
    if recipe.init_from is None or recipe.init_from.head_only is None:
        return 0
    batch = recipe.phases[0].global_batch
    return recipe.init_from.head_only.samples(global_batch=batch, samples_per_epoch=samples_per_epoch)


def _create_loader(setup: Setup, micro_batch: int, micro_batches: int, start: int, views: tuple[View, ...]) -> Loader:
    recipe, data = setup.recipe, setup.recipe.data
    return Loader(
        setup.dataset,
        seed=recipe.seed,
        block=data.block,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        rank=setup.world.rank,
        size=setup.world.size,
        start=start,
        augmentation=views,
        device=setup.world.device,
        backend=data.backend,
        threads=data.threads,
        image_size=recipe.backbone.image_size,
    )
