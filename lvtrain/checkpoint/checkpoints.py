"""Checkpoints that can be trusted: written beside under a fresh name, hashed, synced, voted on, then renamed. The rename is the commit.

Every rank writes one file (what it alone holds, and its share of what all hold); rank 0 decides and the others follow. What a crash leaves is
either a whole checkpoint or a folder nobody will look at. What is found damaged is put aside, and the checkpoint before it is taken; when
something is there but nothing is valid, that is an error and never a fresh start.

The format is the same for every ZeRO stage, number of ranks and GPU: see `checkpoint_files` (folder), `checkpoint_reader` (reading) and the
README. Writing goes on in the background from a snapshot in host memory, over a process group of its own.
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
from typing import Any

from lvtrain import faults
from lvtrain.checkpoint import files as files
from lvtrain.checkpoint import plan as layout
from lvtrain.checkpoint.commit import Commit, Committer, Job
from lvtrain.checkpoint.folder import INTACT, Choice, Found, on_first
from lvtrain.checkpoint.lease import Lease
from lvtrain.checkpoint.reader import Reader, Weights, open_weights
from lvtrain.checkpoint.snapshot import Snapshot
from lvtrain.checkpoint.state import State
from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.files.patience import FULL, in_words, patiently

__all__ = ["Checkpoints", "Commit", "Found", "Reader", "Weights", "open_weights"]

_TRIES = 3  # saves in a row that may fail for a reason that may pass


class Checkpoints:
    """The checkpoints of one run folder, for one job at a time (see `lease`). Construction and all methods are collectives.

    `keep_last` newest ones are kept (at least 2), the first one past every `keep_every_samples`, and those saved with `keep=True`.
    `lease`, on rank 0, is the folder's, held by the caller.

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
        lease: Lease | None,
    ) -> None:
        if keep_last < 2:
            raise ValueError(f"keep_last must be at least 2, got {keep_last}: one may turn out damaged")
        self.folder, self.world = run_folder / "checkpoints", world
        self.run_id, self.fingerprint, self._background = run_id, fingerprint, background
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._job: Job | None = None
        self._failures = 0
        self._trusted: set[Path] = set()  # committed by this very process: read back without hashing it all again
        self._commits: list[Commit] = []
        on_first(self.folder, self._open)
        self._committer = Committer(self.folder, world, lease, keep_last, keep_every_samples)
        self._choice = Choice(self.folder, world, run_id, fingerprint)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        # after an error the other ranks may be gone: give a save under way a chance, do not wait for them for ever
        self.close(timeout=None if kind is None else 60.0)

    def close(self, timeout: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout)

    # ------------------------------------------------------------------------------------------------------------------ saving

    def save(
        self, step: int, samples_seen: int, phase: str, state: State, meta: dict[str, Any], *, keep: bool = False
    ) -> None:
        """Saves `state` as `step_{step}`; returns when the host has a copy (`background`) or when it is committed.

        `meta` must be JSON. A save under way is waited for first: there are never two.

        Raises:
            UserError: not enough room on the disk, it became full or read-only, another job took over, or saves keep failing. What was
                committed before is untouched.
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
        self._job = Job(step, temporary, tensors, text, content, started)
        self._thread = threading.Thread(target=self._committer.write, args=(self._job,), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._background:
            self._settle(final=False)

    def wait(self) -> None:
        """Waits until the last save is committed.

        Raises:
            UserError: it could not be.
        """
        self._settle(final=True)

    def finished(self) -> list[Commit]:
        """The saves that became visible since the last call; no collective."""
        done, self._commits = self._commits, []
        return done

    def _begin(self, step: int, total_bytes: int) -> Path:
        """On rank 0: room enough? Then a folder that did not exist before."""
        target = self.folder / files.folder_name(step)
        if patiently(target.exists):
            raise FileExistsError(f"{target} exists already")
        self._committer.check_lease()
        free = patiently(shutil.disk_usage, self.folder).free
        needed = total_bytes * 1.05 + (1 << 20)
        if free < needed:
            raise UserError(
                f"{self.folder} has {free / 1e6:.1f} MB free but a checkpoint needs {needed / 1e6:.1f} MB; free some and start again "
                "(nothing was written, earlier checkpoints are intact)"
            )
        temporary = self.folder / f"{files.WRITING}{files.folder_name(step)}_{uuid.uuid4().hex[:8]}"
        patiently(temporary.mkdir, exist_ok=True)
        return temporary

    def _settle(self, *, final: bool) -> None:
        """Joins the save under way and looks at how it ended, which every rank knows alike."""
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
            print(f"warning: {reason}; training goes on, try {self._failures} of {_TRIES}", file=sys.stderr, flush=True)

    # ----------------------------------------------------------------------------------------------------------------- loading

    def newest(self) -> Found | None:
        """The newest checkpoint that is whole, decided by rank 0; None when there never was one.

        Files are hashed again, each rank its share. A damaged one is renamed to `damaged_step_...` and the one before it is taken.

        Raises:
            UserError: something is there but nothing is valid, or it is another run's or another dataset's.
        """
        self._settle(final=True)
        return self._choice.newest(self._trusted)

    def load(self, found: Found) -> Reader:
        """Opens a checkpoint that `newest` gave; each rank then reads only what it asks for."""
        faults.point("load.begin", rank=self.world.rank, step=found.step)
        return Reader(found.path, on_first(self.folder, lambda: files.read_manifest(found.path)), found.meta)

    # ------------------------------------------------------------------------------------------------------------------ helpers

    def _open(self) -> None:
        patiently(self.folder.mkdir, parents=True, exist_ok=True)
        for name in patiently(os.listdir, self.folder):  # what attempts that are dead now left behind
            if name.startswith((files.WRITING, files.TRASH)):
                shutil.rmtree(self.folder / name, ignore_errors=True)
