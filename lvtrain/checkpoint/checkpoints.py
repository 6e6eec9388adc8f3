"""The checkpoints of a run: saving in the background, and finding the newest one that is whole.

Every rank writes one file: what only it holds, and its share of what all ranks hold. The files are written under a
temporary name, hashed and flushed to disk. Then the ranks vote, and rank 0 renames the folder. The rename is the commit.

- A crash leaves either a whole checkpoint or a folder that nobody reads.
- A damaged checkpoint is renamed, and the one before it is used. If no valid one is left, that is an error and never a
  fresh start.
- The format is the same for every ZeRO stage, number of ranks and GPU: see `files` (the folder), `reader` (reading) and
  the README.
- A save runs in the background, from a snapshot in host memory, over its own process group.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Literal

from lvtrain import faults
from lvtrain.checkpoint import files as files
from lvtrain.checkpoint import plan as layout
from lvtrain.checkpoint.commit import Commit, Committer, SaveJob
from lvtrain.checkpoint.folder import INTACT, CheckpointFolder, CheckpointInfo, on_first
from lvtrain.checkpoint.lease import Fence
from lvtrain.checkpoint.reader import Reader, Weights, open_weights
from lvtrain.checkpoint.snapshot import Snapshot
from lvtrain.checkpoint.state import State
from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.files.patience import FULL, in_words, patiently

__all__ = ["CheckpointInfo", "Checkpoints", "Commit", "Reader", "Weights", "open_weights"]

_TRIES = 3  # this many failed saves in a row end the run, even if the reason may pass


class Checkpoints:
    """The checkpoints of one run folder, for one job at a time (see `lease`). Construction and all methods are collectives.

    Three kinds are kept: the newest `keep_last`, the first one past every `keep_every_samples`, and those saved with
    `keep=True`. The others are deleted after a newer commit.

    Args:
        run_folder: holds `checkpoints/`.
        world: this process among the ranks.
        keep_last: at least 2.
        keep_every_samples: None = keep none for good.
        run_id: of the run; a checkpoint of another run is refused.
        fingerprint: of the dataset; a checkpoint from another dataset is refused.
        background: return from `save` when the host has a copy.
        lease: of the folder, held by the caller; rank 0 asks it.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self,
        run_folder: Path,
        world: World,
        *,
        keep_last: int = 2,
        keep_every_samples: int | None = None,
        run_id: str,
        fingerprint: str,
        background: bool = True,
        lease: Fence | None,
    ) -> None:
        if keep_last < 2:
            raise ValueError(f"keep_last must be at least 2, got {keep_last}: one may turn out damaged")
        self.folder, self.world = run_folder / "checkpoints", world
        self.run_id, self.fingerprint, self._background = run_id, fingerprint, background
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._job: SaveJob | None = None
        self._failures = 0
        self._trusted: set[Path] = set()  # committed by this very process: read back without hashing it all again
        self._commits: list[Commit] = []
        on_first(self.folder, self._open)
        self._committer = Committer(self.folder, world, lease, keep_last, keep_every_samples)
        self._choice = CheckpointFolder(self.folder, world, run_id, fingerprint)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        # after an error the other ranks may be gone: wait for a save under way, but not for ever
        self.close(timeout=None if kind is None else 60.0)

    def close(self, timeout: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout)

    # ------------------------------------------------------------------------------------------------------------------ saving

    def save(
        self, step: int, samples_seen: int, phase: str, state: State, meta: dict[str, Any], *, keep: bool = False
    ) -> None:
        """Saves `state` as `step_{step}`. Returns when the host has a copy (`background`), or when it is committed.

        An earlier save is waited for first: there are never two. Whatever is raised, earlier checkpoints are intact.

        Args:
            step: optimizer steps so far.
            samples_seen: images so far.
            phase: name of the current phase.
            state: tensors by name.
            meta: JSON values, which `newest` returns.
            keep: never delete this one.

        Raises:
            UserError: the disk is full or read-only, another job took over, or saves keep failing.
            FileExistsError: a checkpoint of that step is there already.
        """
        started = time.perf_counter()
        self._settle(final=False)
        plan = layout.plan(state, self.world.rank, worlds.gather_objects(layout.describe(state)))
        temporary = on_first(self.folder, lambda: self._begin(step, plan.total_bytes))
        faults.point("save.after_mkdir", rank=self.world.rank, step=step)
        content = {
            "format": files.FORMAT,
            "version": files.VERSION,
            "run_id": self.run_id,
            "fingerprint": self.fingerprint,
            "step": step,
            "samples_seen": samples_seen,
            "phase": phase,
            "keep": keep,
            "world_size": self.world.size,
            "tensors": plan.tensors,
        }
        text = json.dumps({"meta": meta}, indent=1)
        tensors = self._snapshot.take(plan.mine, plan.given)
        self._job = SaveJob(step, temporary, tensors, text, content, started)
        self._thread = threading.Thread(target=self._committer.write, args=(self._job,), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._background:
            self._settle(final=False)

    def wait(self) -> None:
        """Waits until the last save is committed.

        Raises:
            UserError: it could not be committed.
        """
        self._settle(final=True)

    def finished(self) -> list[Commit]:
        """The saves that were committed since the last call. Not a collective."""
        done, self._commits = self._commits, []
        return done

    def _begin(self, step: int, total_bytes: int) -> Path:
        """Makes a new temporary folder, if the disk has room for the checkpoint. On rank 0."""
        target = self.folder / files.folder_name(step)
        if patiently(target.exists):
            raise FileExistsError(f"{target} exists already")
        self._committer.check_lease()
        free = patiently(shutil.disk_usage, self.folder).free
        needed = total_bytes * 1.05 + (1 << 20)
        if free < needed:
            raise UserError(
                f"{self.folder} has {free / 1e6:.1f} MB free, but a checkpoint needs {needed / 1e6:.1f} MB; free some and start again "
                "(earlier checkpoints are intact)"
            )
        temporary = self.folder / f"{files.WRITING}{files.folder_name(step)}_{uuid.uuid4().hex[:8]}"
        patiently(temporary.mkdir, exist_ok=True)
        return temporary

    def _settle(self, *, final: bool) -> None:
        """Waits for the save under way, and raises what it failed with. It ends the same way on every rank."""
        if self._thread is None or self._job is None:
            return
        self._thread.join()
        job, self._thread, self._job = self._job, None, None
        if job.commit is not None:
            self._failures = 0
            self._commits.append(job.commit)
            self._trusted.add(self.folder / files.folder_name(job.step))
            return
        error = job.failure
        if isinstance(error, UserError):
            raise error
        if not isinstance(error, OSError):
            raise RuntimeError(f"the checkpoint of step {job.step} failed: {error}") from error
        self._failures += 1
        if error.errno in FULL or final or self._failures >= _TRIES:
            raise in_words(
                error, self.folder, f"the checkpoint of step {job.step} could not be written; {INTACT}"
            ) from error
        if self.world.is_first:
            reason = (
                f"the checkpoint of step {job.step} could not be written to {self.folder}: {error.strerror or error}"
            )
            print(
                f"warning: {reason}; training continues, try {self._failures} of {_TRIES}", file=sys.stderr, flush=True
            )

    # ----------------------------------------------------------------------------------------------------------------- loading

    def newest(self) -> CheckpointInfo | None:
        """The newest checkpoint that is whole; None if there never was one. Rank 0 decides.

        Every rank hashes its share of the files. A damaged checkpoint is renamed to `damaged_step_...`, and the one before
        it is used.

        Raises:
            UserError: there are checkpoints but none is valid, or the newest is of another run or dataset.
        """
        self._settle(final=True)
        return self._choice.newest(self._trusted)

    def to_resume(self, rule: Literal["auto", "must", "never"]) -> CheckpointInfo | None:
        """`newest`, as the recipe's `checkpoint.resume` allows.

        Raises:
            UserError: there is a checkpoint though `rule` is "never", or none though it is "must"; or as `newest`.
        """
        found = self.newest()
        if found is not None and rule == "never":
            raise UserError(
                f"checkpoint.resume=never but {self.folder.parent} holds a run; choose another name=..., or remove it"
            )
        if found is None and rule == "must":
            raise UserError(f"checkpoint.resume=must but {self.folder} holds no checkpoint; start with resume=auto")
        return found

    def load(self, found: CheckpointInfo) -> Reader:
        """Opens a checkpoint that `newest` returned. Each rank then reads only what it asks for."""
        faults.point("load.begin", rank=self.world.rank, step=found.step)
        return Reader(found.path, on_first(self.folder, lambda: files.read_manifest(found.path)), found.meta)

    # ------------------------------------------------------------------------------------------------------------------ helpers

    def _open(self) -> None:
        patiently(self.folder.mkdir, parents=True, exist_ok=True)
        for name in patiently(os.listdir, self.folder):  # left by attempts that are dead now
            if name.startswith((files.WRITING, files.TRASH)):
                shutil.rmtree(self.folder / name, ignore_errors=True)
