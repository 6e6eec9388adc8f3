"""The background half of a save: every rank writes its file, all ranks vote, rank 0 renames, and old checkpoints go.

It runs in a thread on every rank, over its own process group, because training uses the main one.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lvtrain import faults
from lvtrain.checkpoint import files as files
from lvtrain.checkpoint import plan as layout
from lvtrain.checkpoint.lease import Fence, Takeover
from lvtrain.distributed.world import World
from lvtrain.files.atomic import sync_folder
from lvtrain.files.patience import patiently


@dataclass(frozen=True)
class Commit:
    """A committed save: its step, its size in bytes, and the seconds from `save` to the rename."""

    step: int
    size: int
    seconds: float


@dataclass
class SaveJob:
    """One save under way.

    Attributes:
        step: which `step_...` folder it becomes.
        temporary: the folder it is written to.
        tensors: this rank's, on the host.
        state_text: content of `state.json`.
        content: what the manifest will hold.
        started: `time.perf_counter()` at `save`.
        failure: why it failed.
        commit: what was committed.
    """

    step: int
    temporary: Path
    tensors: dict[str, torch.Tensor]
    state_text: str
    content: dict[str, Any]
    started: float
    failure: BaseException | None = None
    commit: Commit | None = None


class Committer:
    """Writes and commits jobs in `folder`, under rank 0's `lease`. Construction is a collective."""

    def __init__(
        self, folder: Path, world: World, lease: Fence | None, keep_last: int, keep_every_samples: int | None
    ) -> None:
        self.folder, self.world, self.lease = folder, world, lease
        self._keep_last, self._keep_every = keep_last, keep_every_samples
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None

    def check_lease(self) -> None:
        """Checks that this job still holds the folder. On rank 0.

        Raises:
            Takeover: another job holds it, or no job does.
        """
        if self.lease is None:
            raise Takeover(f"{self.folder} is not held by this process")
        self.lease.check()

    def write(self, job: SaveJob) -> None:
        """Writes, votes and commits, in the background on every rank.

        Sets the job's `failure` or its `commit`: on every rank the same one of the two.
        """
        rank = self.world.rank
        written: list[files.FileRecord] | Exception
        try:
            written = self._write_files(job)
            self._point("save.before_vote", job)
        except Exception as error:  # the vote tells the others: all give up together, or all continue
            written = error
        try:
            votes = self._gather(written)
            failure = next((vote for vote in votes if isinstance(vote, Exception)), None)
            if rank == 0:
                try:
                    if failure is None:
                        self._make_visible(job, [entry for vote in votes for entry in vote])
                    else:
                        shutil.rmtree(job.temporary, ignore_errors=True)
                except Exception as error:
                    failure = error
                    # nothing here may raise: the other ranks wait for the vote
                    shutil.rmtree(job.temporary, ignore_errors=True)
            failure = self._gather(failure)[0]
            self._point("save.after_commit", job)
        except Exception as error:
            failure = error
        job.failure = failure
        if failure is None:
            size = sum(entry["size"] for entry in job.content["files"].values()) if rank == 0 else 0
            job.commit = Commit(job.step, size, time.perf_counter() - job.started)

    def _write_files(self, job: SaveJob) -> list[files.FileRecord]:
        rank = self.world.rank
        written = []
        if rank == 0:
            path = job.temporary / files.STATE
            written.append(patiently(_afresh, files.write_text, path, job.state_text))
        if job.tensors:
            written.append(patiently(self._write_tensors, job))
        self._point("save.after_files", job)
        return written

    def _write_tensors(self, job: SaveJob) -> files.FileRecord:
        chunks = 0

        def progress() -> None:
            nonlocal chunks
            chunks += 1
            if chunks == 2:
                self._point("save.mid_file", job)

        rank = self.world.rank
        metadata = {"run_id": job.content["run_id"], "step": str(job.step), "rank": str(rank)}
        return _afresh(
            files.write_tensors, job.temporary / layout.file_name(rank), job.tensors, metadata, progress=progress
        )

    def _make_visible(self, job: SaveJob, written: list[files.FileRecord]) -> None:
        """Writes the manifest and renames the folder. On rank 0, when the files of all ranks are on disk."""
        job.content["files"] = {entry.name: {"size": entry.size, "sha256": entry.sha256} for entry in written}
        job.content["created"] = round(time.time(), 3)
        for entry in written:
            size = patiently((job.temporary / entry.name).stat).st_size
            if size != entry.size:
                raise OSError(errno.EIO, f"{entry.name} has {size} bytes instead of {entry.size}")
        self._point("save.before_manifest", job)
        text = files.manifest_text(job.content)
        middle = partial(self._point, "save.mid_manifest", job)
        patiently(_afresh, files.write_text, job.temporary / files.MANIFEST, text, middle=middle)
        patiently(sync_folder, job.temporary)
        self._point("save.before_rename", job)
        self.check_lease()
        target = self.folder / files.folder_name(job.step)
        if patiently(target.exists):
            raise FileExistsError(f"{target} exists already")

        def rename() -> None:
            done = target.exists() and not job.temporary.exists()  # an earlier try worked, although it raised an error
            if not done:
                os.rename(job.temporary, target)

        patiently(rename)
        patiently(sync_folder, self.folder)
        self._point("save.after_rename", job)
        self._retire(job)

    def _retire(self, job: SaveJob) -> None:
        """Deletes what need not be kept, after a newer commit. If that fails, the save has still succeeded."""
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

    def _gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self._group is None:
            return [value]
        box: list[Any] = [None] * self.world.size
        dist.all_gather_object(box, value, group=self._group)
        return box

    def _point(self, name: str, job: SaveJob) -> None:
        faults.point(name, rank=self.world.rank, step=job.step)


def _afresh(write: Callable[..., files.FileRecord], path: Path, *arguments: Any, **more: Any) -> files.FileRecord:
    """Calls `write` after deleting what a failed try left. Nobody else writes in this save's folder."""
    path.unlink(missing_ok=True)
    return write(path, *arguments, **more)
