"""Which checkpoint a run resumes from: its newest one that is whole. Damaged ones are renamed, never deleted."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lvtrain.checkpoint import files as files
from lvtrain.checkpoint import plan as layout
from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.files.patience import in_words, patiently
from lvtrain.files.reading import parse_json

INTACT = "earlier checkpoints are intact; start again when the disk works"


@dataclass(frozen=True)
class CheckpointInfo:
    """A verified checkpoint of this run. `meta` is what `save` was given."""

    path: Path
    step: int
    samples_seen: int
    phase: str
    meta: dict[str, Any]


def on_first(folder: Path, action: Callable[[], Any]) -> Any:
    """Rank 0's result on every rank; what it raises is raised on every rank. A collective.

    Raises:
        UserError: the disk is full or read-only.
        OSError: the file system kept failing. The text says what to do.
    """

    def explained() -> Any:
        try:
            return action()
        except FileExistsError:
            raise
        except OSError as error:
            raise in_words(error, folder, INTACT) from error

    return worlds.on_first(explained)


def refuse_another_dataset(path: Path, trained_on: str, fingerprint: str) -> None:
    """Compares the fingerprint of the dataset that the checkpoint at `path` was trained on with that of a start.

    Raises:
        UserError: they differ.
    """
    if trained_on != fingerprint:
        raise UserError(
            f"{path} was trained on another dataset (its fingerprint differs); point data.path at the same data, or use "
            f"another name=..., and init_from.path={path} to start from its weights"
        )


class CheckpointFolder:
    """The checkpoints in `folder`; those of another run or dataset than `run_id` and `fingerprint` are refused."""

    def __init__(self, folder: Path, world: World, run_id: str, fingerprint: str) -> None:
        self.folder, self.world, self.run_id, self.fingerprint = folder, world, run_id, fingerprint

    def newest(self, trusted: set[Path]) -> CheckpointInfo | None:
        """See `Checkpoints.newest`. Files in `trusted` folders are not hashed again."""
        while True:
            candidate: tuple[Path, dict[str, Any]] | None = on_first(self.folder, self._candidate)
            if candidate is None:
                return None
            path, content = candidate
            verdicts = worlds.gather_objects([] if path in trusted else self._verify(path, content))
            for verdict in verdicts:  # if a rank cannot read, the checkpoint may be intact: all stop
                if isinstance(verdict, OSError):
                    raise in_words(verdict, path, INTACT)
            problems = [problem for verdict in verdicts for problem in verdict]
            if not problems:
                break
            on_first(self.folder, partial(self._quarantine, path, problems[0]))
        state = parse_json(on_first(self.folder, partial(patiently, (path / files.STATE).read_text)))
        return CheckpointInfo(path, content["step"], content["samples_seen"], content["phase"], state["meta"])

    def _candidate(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest folder whose manifest and sizes are right. Damaged newer ones are renamed. On rank 0."""
        there = layout.committed(self.folder)
        for path in there:
            try:
                content = files.read_manifest(path)
            except files.Damage as damage:
                self._quarantine(path, str(damage))
                continue
            self._own(path, content)
            return path, content
        names = patiently(os.listdir, self.folder)  # not glob: it takes a folder that cannot be read for empty
        put_aside = sorted(name for name in names if name.startswith(files.DAMAGED))
        if put_aside:
            raise UserError(
                f"{self.folder} holds checkpoints, but none is valid ({', '.join(put_aside)}); restore one, or remove them to start afresh"
            )
        return None

    def _own(self, path: Path, content: dict[str, Any]) -> None:
        if content["version"] > files.VERSION:
            raise UserError(f"{path} was written by a newer lvtrain (format {content['version']}); update lvtrain")
        if content["run_id"] != self.run_id:
            raise UserError(f"{path} belongs to another run; remove it, or use init_from.path={path} in a new run")
        refuse_another_dataset(path, content["fingerprint"], self.fingerprint)

    def _verify(self, path: Path, content: dict[str, Any]) -> list[str] | OSError:
        """Hashes this rank's share of the files. Returns what is wrong with them, or why they cannot be read."""
        names = sorted(content["files"])[self.world.rank :: self.world.size]
        try:
            checked = [files.check_file(path, name, content) for name in names]
        except OSError as error:
            return error
        return [problem for problem in checked if problem]

    def _quarantine(self, path: Path, problem: str) -> None:
        aside = path.with_name(f"{files.DAMAGED}{path.name}")
        if patiently(aside.exists):
            aside = aside.with_name(f"{aside.name}_{uuid.uuid4().hex[:8]}")
        patiently(os.rename, path, aside)
        print(f"damaged checkpoint {path}: {problem}; renamed to {aside.name}", file=sys.stderr, flush=True)
