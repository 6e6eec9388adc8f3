"""What a phase trains with: method, engine, averaged weights, loader, stage. Built for this world size, then restored from a checkpoint."""

from __future__ import annotations

from typing import Any

from lvtrain.checkpoint.checkpoints import Checkpoints, Found
from lvtrain.data import Loader
from lvtrain.engine.engine import Engine
from lvtrain.methods import create_method
from lvtrain.methods.supervised import SupervisedMethod
from lvtrain.training.ema import Average
from lvtrain.training.initial import start_weights
from lvtrain.training.meter import Meter
from lvtrain.training.phases import CosineStage, PhasePlan, plan_phase
from lvtrain.training.position import Position
from lvtrain.training.run_folder import Run
from lvtrain.training.schedule import LearningRate
from lvtrain.training.telemetry import Telemetry


class Built:
    """The phase `position` stands in, or the one after a phase that is over. `found` is of this phase, or of the end of the one before.

    `entering` says that the phase begins here. `data_skip`: samples that a roll-back leaps over.

    Raises:
        UserError: weights or state that do not fit the recipe.
    """

    def __init__(
        self,
        run: Run,
        checkpoints: Checkpoints,
        telemetry: Telemetry,
        rate: LearningRate,
        position: Position,
        found: Found | None,
        data_skip: int,
    ) -> None:
        recipe, world = run.recipe, run.world
        self.entering = found is None or position.phase_over
        restored_phase = recipe.phases[position.phase_index]
        self.position = position.next_phase() if position.phase_over else Position(**position.to_dict())
        self.position.data_skip = data_skip
        self.phase = phase = recipe.phases[self.position.phase_index]
        self.plan: PhasePlan = plan_phase(
            phase,
            self.position.phase_index,
            start_step=self.position.phase_start_step,
            start_samples=self.position.phase_start_samples,
            total=rate.total,
            samples_per_epoch=len(run.dataset),
        )
        self.accumulation = phase.micro_batches // world.size

        self.method = create_method(recipe, num_classes=run.num_classes, device=world.device)
        if run.teacher is not None:
            assert isinstance(self.method, SupervisedMethod)  # only its section names one
            self.method.distil_from(run.teacher)
        if found is None:
            told = start_weights(run, self.method)
            if told:
                telemetry.event("init_from", **told)
                telemetry.say(f"starting from {', '.join(f'{name} {value}' for name, value in told.items() if value)}")
        self.average = Average(self.method.evaluated(), recipe.ema.decay) if recipe.ema else None
        if recipe.backbone.compile:
            self.method.evaluated().compile()  # in place: the names stay, and the averaged copy stays as it is
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
        if self.entering and found is not None:
            self.method.enter_phase(phase, first_time=True)
        self.stage = CosineStage(phase.end.cos2, getattr(recipe.method, "window", recipe.logging.every), world.device)
        self.meter = Meter(world.device)
        if found is not None and not self.entering:
            self.stage.load_state(found.meta["stage"])
            self.meter.load_state(found.meta["meter"])
        self.loader = Loader(
            run.dataset,
            seed=recipe.seed,
            block=recipe.data.block,
            micro_batch=phase.micro_batch,
            micro_batches=phase.micro_batches,
            rank=world.rank,
            size=world.size,
            start=self.position.stream,
            augmentation=recipe.data.augmentation,
            device=world.device,
            backend=recipe.data.backend,
            threads=recipe.data.threads,
            prefetch=recipe.data.prefetch,
            read_ahead=recipe.data.prefetch,
            image_size=recipe.backbone.image_size,
            warn=telemetry.warn,
        )

    def state(self, rank: int, size: int) -> dict[str, Any]:
        """Every tensor a resumed run needs, by name; of what all ranks hold alike, this rank gives its share. A collective."""
        state = self.engine.export_state(keep=lambda i: i % size == rank) | self.method.state()
        return state | self.average.state() if self.average else state

    def meta(self) -> dict[str, Any]:
        """The rest of it, as JSON."""
        return {"position": self.position.to_dict(), "stage": self.stage.state(), "meter": self.meter.state()}

    def close(self) -> None:
        self.loader.close()
        self.engine.close()
