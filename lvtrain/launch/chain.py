"""A chain: one resumable Slurm job for each phase of a run. Submission freezes it in `runs/NAME/slurm/chain.json`."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from lvtrain.errors import UserError
from lvtrain.files.atomic import write_json
from lvtrain.files.patience import patiently
from lvtrain.files.reading import parse_json
from lvtrain.launch.site import Site
from lvtrain.training.outcome import Outcome


@dataclass(frozen=True)
class Chain:
    """What was submitted. Paths are absolute, because jobs may start anywhere; `home` is the checkout they run in."""

    name: str
    home: str
    run_folder: str
    phases: tuple[str, ...]
    recipe: str
    ds_config: str
    overrides: tuple[str, ...]
    site: Site
    main: str = "lvtrain/main.py"

    @property
    def folder(self) -> Path:
        """Where the chain keeps its plan, ledger, scripts and logs."""
        return Path(self.run_folder) / "slurm"

    @property
    def job_name(self) -> str:
        """The name of every job of this chain, and of no other's.

        Singleton dependencies, the queue and `scancel --name` use it. It contains a hash of the folder, because two runs
        of one name may lie in different folders.
        """
        return f"lvtrain-{self.name}-{hashlib.sha256(self.run_folder.encode()).hexdigest()[:6]}"

    def script(self, phase: str) -> Path:
        return self.folder / f"{phase}.sbatch"

    def next_phase(self, phase: str) -> str | None:
        following = self.phases[self.phases.index(phase) + 1 :]
        return following[0] if following else None

    def is_done(self, phase: str) -> bool:
        return (Path(self.run_folder) / "phase_done" / f"{phase}.json").is_file()

    def mark_done(self, phase: str, outcome: Outcome) -> None:
        """Writes the mark that makes every later start of this phase do nothing."""
        folder = Path(self.run_folder) / "phase_done"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{phase}.json", asdict(outcome))

    def first_open_phase(self) -> str | None:
        return next((phase for phase in self.phases if not self.is_done(phase)), None)

    def task_command(self, phase: str, max_minutes: float | None) -> list[str]:
        """The command of one task: the trainer for this phase, for at most `max_minutes`."""
        limit = [] if max_minutes is None else ["--max-time", f"{max_minutes:.2f}"]
        recipe = ["--recipe", self.recipe, "--ds_config", self.ds_config]
        return [self.site.python, self.main, *recipe, "--phase", phase, *limit, *self.overrides]

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "chain.json", asdict(self), indent=2)


def load_chain(run_folder: Path) -> Chain:
    """Reads the chain of a run.

    Raises:
        UserError: the run has no chain, or its file is damaged.
    """
    path = Path(run_folder) / "slurm" / "chain.json"
    if not path.is_file():
        raise UserError(
            f"{run_folder} has no Slurm chain ({path} is missing); give the run folder that the submission printed "
            "(with runs=FOLDER it is FOLDER/NAME), or submit a chain with sbatch slurm/<script>.sh"
        )
    try:
        values = parse_json(patiently(path.read_text))
        values["site"] = Site(**values["site"])
        values["phases"], values["overrides"] = tuple(values["phases"]), tuple(values["overrides"])
        return Chain(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); submit the same script again, which writes it anew") from None
