"""Checkpoints that can be trusted: written beside under a fresh name, hashed, synced, voted on, then renamed. The rename is the commit.

Every rank writes one file (what it alone holds, and its share of what all hold); rank 0 decides and the others follow. What a crash leaves is
either a whole checkpoint or a folder nobody will look at. What is found damaged is put aside, and the checkpoint before it is taken; when
something is there but nothing is valid, that is an error and never a fresh start.

The format is the same for every ZeRO stage, number of ranks and GPU: see `checkpoint_files` (folder), `checkpoint_reader` (reading) and the
README. Writing goes on in the background from a snapshot in host memory, over a process group of its own.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lvtrain import world as worlds
from lvtrain.errors import UserError
from lvtrain.state import State
from lvtrain.training import checkpoint_files as files
from lvtrain.training import checkpoint_layout as layout
from lvtrain.training import faults
from lvtrain.training.checkpoint_reader import Reader, Weights, open_weights
from lvtrain.training.lease import Lease, Lost
from lvtrain.training.snapshot import Snapshot
from lvtrain.world import World

__all__ = ["Checkpoints", "Commit", "Found", "Reader", "Weights", "open_weights"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_TRIES = 3  # saves in a row that may fail for a reason that may pass


@dataclass(frozen=True)
class Found:
    """A checkpoint of this run, verified: `meta` is what `save` was given."""

    path: Path
    step: int
    samples_seen: int
    phase: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class Commit:
    """A save that became visible: bytes on disk, seconds from `save` to the rename."""

    step: int
    size: int
    seconds: float


@dataclass
class _Job:
    """One save under way."""

    step: int
    temporary: Path
    tensors: dict[str, torch.Tensor]
    state_text: str
    content: dict[str, Any]
    started: float
    failure: BaseException | None = None
    commit: Commit | None = None


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
        self.run_id, self.fingerprint = run_id, fingerprint
        self._keep_last, self._keep_every, self._background = keep_last, keep_every_samples, background
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._job: _Job | None = None
        self._failures = 0
        self._trusted: set[Path] = set()  # committed by this very process: read back without hashing it all again
        self._commits: list[Commit] = []
        self._lease = lease
        self._first(self._open)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None

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
        temporary = self._first(lambda: self._begin(step, plan.total_bytes))
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
        text = json.dumps({"step": step, "samples_seen": samples_seen, "phase": phase, "meta": meta}, indent=1)
        tensors = self._snapshot.take(plan.mine, plan.given)
        self._job = _Job(step, temporary, tensors, text, content, started)
        self._thread = threading.Thread(target=self._write, args=(self._job,), name="checkpoint", daemon=True)
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
        if target.exists():
            raise FileExistsError(f"{target} exists already")
        self._own_lease().check()
        free = shutil.disk_usage(self.folder).free
        if free < total_bytes * 1.05 + (1 << 20):
            raise UserError(
                f"{self.folder} has {free / 1e6:.1f} MB free but a checkpoint takes {total_bytes / 1e6:.1f} MB; free some and start again "
                "(nothing was written, earlier checkpoints are intact)"
            )
        temporary = self.folder / f"{files.WRITING}{files.folder_name(step)}_{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        return temporary

    def _write(self, job: _Job) -> None:
        """In the background, on every rank: write, vote, commit. Sets the job's failure or commit, the same kind on every rank."""
        rank = self.world.rank
        written: list[files.Written] | Exception
        try:
            written = self._write_files(job)
            self._point("save.before_vote", job)
        except Exception as error:  # told to the others: all give up together, or all go on
            written = error
        try:
            votes = self._gather(written)
            failure = next((vote for vote in votes if isinstance(vote, Exception)), None)
            if rank == 0:
                try:
                    if failure is None:
                        self._commit(job, [entry for vote in votes for entry in vote])
                    else:
                        shutil.rmtree(job.temporary, ignore_errors=True)
                except Exception as error:
                    failure = error
                    if job.temporary.exists():
                        shutil.rmtree(job.temporary, ignore_errors=True)
            failure = self._gather(failure)[0]
            self._point("save.after_commit", job)
        except Exception as error:
            failure = error
        job.failure = failure
        if failure is None:
            size = sum(entry["size"] for entry in job.content["files"].values()) if rank == 0 else 0
            job.commit = Commit(job.step, size, time.perf_counter() - job.started)
            self._trusted.add(self.folder / files.folder_name(job.step))

    def _write_files(self, job: _Job) -> list[files.Written]:
        rank = self.world.rank
        chunks = 0

        def progress() -> None:
            nonlocal chunks
            chunks += 1
            if chunks == 2:
                self._point("save.mid_file", job)

        written = []
        if rank == 0:
            written.append(files.write_text(job.temporary / files.STATE, job.state_text))
        if job.tensors:
            metadata = {"run_id": self.run_id, "step": str(job.step), "rank": str(rank)}
            path = job.temporary / layout.file_name(rank)
            written.append(files.write_tensors(path, job.tensors, metadata, progress=progress))
        self._point("save.after_files", job)
        return written

    def _commit(self, job: _Job, written: list[files.Written]) -> None:
        """On rank 0, when all ranks' files are on disk."""
        job.content["files"] = {entry.name: {"size": entry.size, "sha256": entry.sha256} for entry in written}
        job.content["created"] = round(time.time(), 3)
        for entry in written:
            size = (job.temporary / entry.name).stat().st_size
            if size != entry.size:
                raise OSError(errno.EIO, f"{entry.name} has {size} bytes instead of {entry.size}")
        self._point("save.before_manifest", job)
        text = files.manifest_text(job.content)
        files.write_text(job.temporary / files.MANIFEST, text, middle=lambda: self._point("save.mid_manifest", job))
        files.sync_folder(job.temporary)
        self._point("save.before_rename", job)
        self._own_lease().check()
        target = self.folder / files.folder_name(job.step)
        if target.exists():
            raise FileExistsError(f"{target} exists already")
        os.rename(job.temporary, target)
        files.sync_folder(self.folder)
        self._point("save.after_rename", job)
        self._retire(job)

    def _retire(self, job: _Job) -> None:
        """Deletes what need not be kept; only ever after a newer commit. A failure to delete is no failure to save."""
        self._point("retention.begin", job)
        try:
            for path in layout.superseded(self.folder, self._keep_last, self._keep_every):
                trash = self.folder / f"{files.TRASH}{path.name}_{uuid.uuid4().hex[:8]}"
                os.rename(path, trash)
                self._point("retention.renamed", job)
                shutil.rmtree(trash)
        except OSError as error:
            print(f"cannot delete old checkpoints in {self.folder}: {error}", file=sys.stderr, flush=True)
        self._point("retention.end", job)

    def _settle(self, *, final: bool) -> None:
        """Joins the save under way and looks at how it ended, which every rank knows alike."""
        if self._thread is None or self._job is None:
            return
        self._thread.join()
        job, self._thread, self._job = self._job, None, None
        if job.commit is not None:
            self._failures = 0
            self._commits.append(job.commit)
            return
        error = job.failure
        if isinstance(error, UserError):
            raise error
        if not isinstance(error, OSError):
            raise RuntimeError(f"the checkpoint of step {job.step} failed: {error}") from error
        self._failures += 1
        reason = f"the checkpoint of step {job.step} could not be written to {self.folder}: {error.strerror or error}"
        if error.errno in _FULL or final or self._failures >= _TRIES:
            raise UserError(f"{reason}; earlier checkpoints are intact, mend it and start again") from error
        if self.world.is_first:
            print(f"warning: {reason}; training goes on, try {self._failures} of {_TRIES}", file=sys.stderr, flush=True)

    # ----------------------------------------------------------------------------------------------------------------- loading

    def newest(self) -> Found | None:
        """The newest checkpoint that is whole, decided by rank 0; None when there never was one.

        Files are hashed again, shared out over the ranks. A damaged one is renamed to `damaged_step_...` and the one before it is taken.

        Raises:
            UserError: something is there but nothing is valid, or it is another run's or another dataset's.
        """
        self._settle(final=True)
        while True:
            candidate: tuple[Path, dict[str, Any]] | None = self._first(self._candidate)
            if candidate is None:
                return None
            path, content = candidate
            problems = [problem for part in worlds.gather_objects(self._verify(path, content)) for problem in part]
            if not problems:
                break
            self._first(partial(self._quarantine, path, problems[0]))
        text = self._first(lambda: (path / files.STATE).read_text())
        state = json.loads(text)
        return Found(path, state["step"], state["samples_seen"], state["phase"], state["meta"])

    def load(self, found: Found) -> Reader:
        """Opens a checkpoint that `newest` gave; each rank then reads only what it asks for."""
        faults.point("load.begin", rank=self.world.rank, step=found.step)
        return Reader(found.path, self._first(lambda: files.read_manifest(found.path)), found.meta)

    def _candidate(self) -> tuple[Path, dict[str, Any]] | None:
        """On rank 0: the newest folder whose manifest and sizes are right; damaged ones are put aside on the way."""
        there = layout.committed(self.folder)
        for path in there:
            try:
                content = files.read_manifest(path)
            except files.Damaged as damage:
                self._quarantine(path, str(damage))
                continue
            self._own(path, content)
            return path, content
        put_aside = sorted(path.name for path in self.folder.glob(f"{files.DAMAGED}*"))
        if put_aside:
            raise UserError(
                f"{self.folder} holds checkpoints but none is valid ({', '.join(put_aside)}); restore one, or remove them to start afresh"
            )
        return None

    def _own(self, path: Path, content: dict[str, Any]) -> None:
        if content["version"] > files.VERSION:
            raise UserError(f"{path} was written by a newer lvtrain (format {content['version']}); update lvtrain")
        if content["run_id"] != self.run_id:
            raise UserError(f"{path} belongs to another run; remove it, or use init_from.path={path} in a new run")
        if content["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{path} was trained on another dataset (its fingerprint differs); point data.path at the same data, or use init_from"
            )

    def _verify(self, path: Path, content: dict[str, Any]) -> list[str]:
        """Hashes this rank's share of the files."""
        if path in self._trusted:
            return []
        names = sorted(content["files"])[self.world.rank :: self.world.size]
        checked = [files.check_file(path, name, content["files"][name]["sha256"]) for name in names]
        return [problem for problem in checked if problem]

    def _quarantine(self, path: Path, problem: str) -> None:
        aside = path.with_name(f"{files.DAMAGED}{path.name}")
        if aside.exists():
            aside = aside.with_name(f"{aside.name}_{uuid.uuid4().hex[:8]}")
        os.rename(path, aside)
        print(f"damaged checkpoint {path}: {problem}; put aside as {aside.name}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------------------------------------------------------ helpers

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (files.WRITING, files.TRASH):  # what attempts that are dead now left behind
            for path in self.folder.glob(f"{pattern}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _own_lease(self) -> Lease:
        if self._lease is None:
            raise Lost(f"{self.folder} is not held by this process")
        return self._lease

    def _first(self, action: Callable[[], Any]) -> Any:
        """Rank 0's result on every rank; what it raises is raised on every rank, an OSError in a user's words."""

        def explained() -> Any:
            try:
                return action()
            except FileExistsError:
                raise
            except OSError as error:
                raise UserError(
                    f"cannot write in {self.folder}: {error.strerror or error}; earlier checkpoints are intact, mend it and start again"
                ) from error

        return worlds.on_first(explained)

    def _gather(self, value: Any) -> list[Any]:
        """Every rank's value, over the checkpoints' own group: the main one is training's."""
        if self._group is None:
            return [value]
        box: list[Any] = [None] * self.world.size
        dist.all_gather_object(box, value, group=self._group)
        return box

    def _point(self, name: str, job: _Job) -> None:
        faults.point(name, rank=self.world.rank, step=job.step)
