"""What a start says: which event, which console line and which row of metrics, at each turn of a run.

The trainer calls `RunLog` and `Telemetry` writes. Nothing here changes what is trained.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from lvtrain.checkpoint.lease import Fence
from lvtrain.classifier.kernel import failure
from lvtrain.data.epochs import EpochCount, counts, epoch_line, unfinished
from lvtrain.distributed import world as worlds
from lvtrain.distributed.gpu import sees_only_its_own
from lvtrain.evaluation import suite
from lvtrain.health.causes import Finding
from lvtrain.health.curves import find_reference
from lvtrain.health.on_track import Note, OnTrack
from lvtrain.methods import LossOutput, method_title
from lvtrain.recipe.registry import METHODS
from lvtrain.training import outcome as outcomes
from lvtrain.training.nonfinite import note_batch
from lvtrain.training.outcome import Outcome
from lvtrain.training.phase_state import PhaseState, Setup
from lvtrain.training.run_folder import RunFolder
from lvtrain.training.schedule import Position, rate_line
from lvtrain.training.telemetry import Telemetry, progress_line
from lvtrain.training.trackers import TrackedRun


class RunLog:
    """The reports of one start. Every rank calls every method.

    Args:
        folder: of the run, opened for this start.
        fence: of that folder.
        kernel: of the classifier, None without one.
    """

    def __init__(self, setup: Setup, folder: RunFolder, fence: Fence, *, kernel: str | None) -> None:
        self.recipe, self.dataset, self.world = setup.recipe, setup.dataset, setup.world
        self.folder, self.kernel = folder, kernel
        tracked = TrackedRun(folder.path, folder.run_id, self.recipe.model_dump(mode="json"))
        self.telemetry = Telemetry(tracked, self.world, self.recipe.logging.trackers, fence)
        self.dataset.warn = self.telemetry.warn
        self.on_track: OnTrack | None = None  # on rank 0, once training starts
        self._opened: dict[str, dict[str, str]] = {}  # reported once, and not in every phase
        self._named: set[str] = set()  # causes that the health check has named

    def event(self, phase: PhaseState, event: str, /, **fields: Any) -> None:
        """An event at the phase's position."""
        self.telemetry.event(event, **(phase.place() | fields))

    # ------------------------------------------------------------------------------------------------------ start and end

    def begin(self, position: Position) -> None:
        """Resumes the files at `position`, and reports what this start changes."""
        self.telemetry.begin(position.step)
        attempt = self.folder.attempt
        for what, found in (("recipe", self.folder.changes), ("environment", self.folder.surroundings)):
            for change in found:
                self.telemetry.event(f"{what}_changed", step=position.step, attempt=attempt, change=change)
                self.telemetry.say(f"lvtrain: {what} changed at step {position.step}, start {attempt}: {change}")
        if self.world.device.type == "cuda":
            self._gpu()

    def _gpu(self) -> None:
        """The classifier's kernel, and whether NCCL finds the other GPUs. Each rank concerned prints what is wrong."""
        tested = self.recipe.classifier is not None and self.recipe.classifier.numerics.kernel == "auto"
        wrong = failure(self.world.device) if tested else None
        if wrong is not None:
            self.telemetry.event_of_rank("kernel_self_test", rank=self.world.rank, failed=wrong)
            self.telemetry.warn(f"the Triton kernels failed their self-test, so the torch path is used ({wrong})")
        if self.kernel:
            self.telemetry.say(f"lvtrain: classifier kernel: {self.kernel}")
        if sees_only_its_own(self.world.local_rank, torch.cuda.device_count()):
            self.telemetry.warn(
                "sees only its own GPU, so NCCL may not use NVLink to the others of its node; start with --gpus-per-node, "
                "without --gpus-per-task"
            )

    def start(self, position: Position, *, resumes: bool) -> None:
        """There is something to train."""
        size = self.world.size
        where = {"step": position.step, "samples_seen": position.samples_seen, "world_size": size}
        self.telemetry.event("resume" if resumes else "start", **where, attempt=self.folder.attempt)
        self.telemetry.say(f"lvtrain: method {method_title(self.recipe.method.name)}")
        self.telemetry.say(
            f"lvtrain: {'resuming' if resumes else 'starting'} {self.folder.path} at step {position.step}, phase "
            f"{self.recipe.phases[position.next_index].name}, number of ranks: {size} ({self.world.device.type})"
        )
        self.telemetry.say(f"lvtrain: {rate_line(self.recipe.optimizer, self.recipe.phases)}")
        if self.world.is_first:
            self.on_track = self._follow()

    def _follow(self) -> OnTrack:
        """What follows the run's loss, with what is known of such a run."""
        recipe, num_classes = self.recipe, self.dataset.num_classes
        try:
            expected = METHODS.get(recipe.method.name).first_loss(recipe, num_classes=num_classes)
        except Exception as error:  # of a margin or method that is not ours; a check does not stop a run
            expected = f"it could not be computed ({type(error).__name__}: {error})"
        reference = find_reference(recipe, num_classes=num_classes, num_samples=len(self.dataset))
        found = OnTrack(expected, reference, self.folder.path)
        for note in found.start():
            self.telemetry.event(note.event, **note.fields)
            self.telemetry.say(f"lvtrain: {note.text}")
        return found

    def done(self, outcome: Outcome) -> None:
        """The start is over; rank 0 writes `outcome.json`."""
        is_done = outcome.outcome == "done"
        verdict = "done" if is_done else "stop"
        self.telemetry.event(verdict, step=outcome.step, phase=outcome.phase, reason=outcome.reason)
        folder = self.folder.path
        then = f"python tools/report.py {folder} shows it" if is_done else "start the same command again to resume"
        self.telemetry.say(f"lvtrain: {verdict} at step {outcome.step}: {outcome.reason}; run folder {folder}; {then}")
        if self.world.is_first:
            self.telemetry.check_fence()
            outcomes.write(folder, outcome)

    def failed(self, outcome: Outcome) -> None:
        """An error ended the start. Any rank writes `outcome.json`, because rank 0 may be waiting in a collective.

        Raises:
            FolderInUse: another job holds the folder, or rank 0 has written the same and left.
        """
        self.telemetry.check_fence()
        self.telemetry.event("error", reason=outcome.reason)
        outcomes.write(self.folder.path, outcome)

    # ------------------------------------------------------------------------------------------------------------- phases

    def opened(self, phase: PhaseState) -> None:
        """Files that the method opened, and weights that a fresh run loaded."""
        for what, facts in phase.opened.items():
            if self._opened.get(what) != facts:
                self.telemetry.event(what, **facts)
                self.telemetry.say(f"lvtrain: {what}: {facts['name']}")
        self._opened = phase.opened
        if phase.initial:
            self.telemetry.event("init_from", **phase.initial)
            taken = ", ".join(f"{name} {value}" for name, value in phase.initial.items() if value)
            self.telemetry.say(f"starting from {taken}")

    def phase_start(self, phase: PhaseState, *, enters: bool) -> None:
        """The phase is trained next; it begins here (`enters`), or goes on."""
        self._name(phase, phase.health.at_start())
        if enters:
            self.event(phase, "phase_start", world_size=self.world.size, accumulation=phase.accumulation)
            if phase.position.step:
                self.telemetry.say(f"lvtrain: phase {phase.section.name} begins at step {phase.position.step}")
        if self.on_track:
            notes = self.on_track.phase_started(phase.section.name, phase.section.end.cos2)
            self._note(phase, notes if enters else [])

    def phase_end(self, phase: PhaseState, reason: str) -> None:
        self.event(phase, "phase_end", reason=reason, cos2_window=phase.stage.last_mean)
        if self.on_track:
            self._note(phase, self.on_track.phase_ended(phase.now().epoch, reason))

    def rollback(self, after: Position, to: Position) -> None:
        """The run goes back from `after`, where a stretch of data that was not finite ends."""
        self.telemetry.event("rollback", step=after.step, to_step=to.step, data_skip=to.data_skip)
        self.telemetry.begin(to.step)

    # -------------------------------------------------------------------------------------------------------------- steps

    def metrics(self, phase: PhaseState) -> None:
        """One row of metrics and one line on the console. A collective."""
        row = phase.metrics_row()
        if self.on_track:
            row |= self.on_track.columns(row["epoch"])
        self.telemetry.metrics(row)
        self._name(phase, phase.health.read(row))
        for warning in phase.method.warnings(row, phase.now(steps_back=1)) if row["loss"] is not None else []:
            self.event(phase, "warning", text=warning)
            self.telemetry.say(f"warning: {warning}")
        left = (phase.rate.total - phase.position.samples_seen) / max(row["images_per_second"], 0.01)
        self.telemetry.say(progress_line(row, phase=phase.section.name, seconds_left=left))
        if self.on_track:
            first, phase.first_loss = phase.first_loss, None
            notes = self.on_track.first_loss(float(first)) if first is not None else []
            self._note(phase, notes + self.on_track.add(row))

    def nonfinite(self, phase: PhaseState, figures: dict[str, float], outputs: list[LossOutput]) -> None:
        """A step is skipped, because its loss or gradient norm (`figures`) is not finite. A collective."""
        position = phase.position
        if self.world.is_first:
            self.telemetry.check_fence()
        noted, said = note_batch(self.folder.path, phase.loader, position.stream, outputs, phase.place() | figures)
        self.event(phase, "nonfinite", in_row=phase.nonfinite_in_row, **noted)
        if said:
            values = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
            self.telemetry.say(f"warning: step {position.step} is skipped, it was not finite ({values}); {said}")

    def bad_samples(self, phase: PhaseState) -> None:
        """Images of the last step that this rank could not decode."""
        for sample in phase.loader.bad_samples:
            self.telemetry.event_of_rank("bad_sample", step=phase.position.step, **asdict(sample))
        phase.loader.bad_samples.clear()

    def served(self, phase: PhaseState) -> tuple[int, int]:
        """Reports bad images and the count of a finished epoch; returns the bad and all images of the phase.

        A collective, because each rank decodes and counts its own images.
        """
        loader = phase.loader
        answers = worlds.gather_objects((loader.bad_count, loader.seen_count, phase.tally.ended(phase.position.stream)))
        bad, seen = sum(answer[0] for answer in answers), sum(answer[1] for answer in answers)
        ended = [part for _, _, part in answers if part is not None]
        self._epochs(phase, counts(ended, len(self.dataset)))
        if bad > phase.bad_reported:
            self.telemetry.say(
                f"warning: {bad} of {seen} images could not be decoded so far and are skipped; events.jsonl lists them"
            )
            phase.bad_reported = bad
        return bad, seen

    def last_epoch(self, phase: PhaseState) -> None:
        """The count of the epoch in which the run ends. A collective."""
        self._epochs(phase, unfinished(worlds.gather_objects(phase.tally.sums), len(self.dataset)))

    def evaluation(self, phase: PhaseState, name: str, results: dict[str, Any]) -> None:
        self.telemetry.evaluation(name, results)
        figures = {benchmark: suite.figure(result) for benchmark, result in results["benchmarks"].items()}
        self.event(phase, "evaluation", name=name, figures=figures)

    # ------------------------------------------------------------------------------------------------------------ helpers

    def _epochs(self, phase: PhaseState, found: list[EpochCount]) -> None:
        for count in found:
            self.event(phase, "epoch", **asdict(count))
        # on a small dataset several epochs end between two lines of the log: then the last one is enough
        for count in [*(each for each in found[:-1] if not each.is_plain), *found[-1:]]:
            self.telemetry.say(f"lvtrain: {epoch_line(count, self.world.size)}")

    def _note(self, phase: PhaseState, notes: list[Note]) -> None:
        for note in notes:
            self.event(phase, note.event, **note.fields)
            self.telemetry.say(f"{'warning' if note.is_warning else 'lvtrain'}: {note.text}")

    def _name(self, phase: PhaseState, findings: list[Finding]) -> None:
        """Reports causes that the health check names, each once a start."""
        for found in findings:
            if found.cause not in self._named:
                self._named.add(found.cause)
                fields = {"cause": found.cause, "text": found.text, "warning": found.is_warning}
                self._note(phase, [Note("health", fields, found.text, found.is_warning)])
