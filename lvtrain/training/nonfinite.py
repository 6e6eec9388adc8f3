"""Steps whose loss or gradient was not finite: which images they had (`nonfinite.jsonl`), and where to go back to.

The position alone says which images they were. Where the method computes cosines, each image has that to its own class
centre; it is not finite where the embedding is not. Only the first steps of a run are noted, and of each step only the
images that are most likely the cause.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvtrain.checkpoint.checkpoints import CheckpointInfo, Checkpoints
from lvtrain.data import Loader
from lvtrain.distributed import world as worlds
from lvtrain.errors import UserError
from lvtrain.methods import LossOutput
from lvtrain.training.schedule import Position

FILE = "nonfinite.jsonl"
IN_ROW = 3  # steps that stop the run, or roll it back
_ROLLBACKS = 3  # to one checkpoint: what is not finite after that is not a stretch of bad data
_STEPS, _SAMPLES = 8, 32


class RollBack(Exception):
    """Too many non-finite steps in a row, and the recipe says to skip that stretch of data. `position` is after it."""

    def __init__(self, position: Position) -> None:
        self.position = position


class RollBacks:
    """The roll-backs of one start."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.steps: list[int] = []  # of the checkpoints gone back to

    def add(self, after: Position) -> tuple[CheckpointInfo, Position]:
        """The newest checkpoint, and its position moved past the stretch of data that ends at `after`. A collective.

        Raises:
            UserError: there is no checkpoint, or going back to it has not helped.
        """
        found = self.checkpoints.newest()
        if found is None:
            raise UserError(
                "the loss is not finite and there is no checkpoint to go back to; "
                "lower optimizer.lr or lengthen schedule.warmup"
            )
        if self.steps.count(found.step) == _ROLLBACKS:
            raise UserError(
                f"the loss is not finite whatever data is skipped: {_ROLLBACKS} roll-backs to step {found.step} did not "
                "get past it; lower optimizer.lr, or resume from an earlier checkpoint by removing later ones"
            )
        self.steps.append(found.step)
        stored = Position.stored_in(found)
        return found, replace(stored, data_skip=after.stream - stored.samples_seen)


def note_batch(
    run_folder: Path, loader: Loader, first: int, outputs: list[LossOutput], where: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Notes the batch that begins at position `first` of the stream. A collective.

    Args:
        run_folder: folder that `nonfinite.jsonl` lies in.
        loader: which made the batch.
        first: stream position of the batch.
        outputs: of this rank's A micro-batches.
        where: what else the line has (step, phase, loss, ...).

    Returns:
        Fields of an event, and the end of a sentence for the console. Both are empty once enough steps are noted.
    """
    by_rank = worlds.gather_objects([float(output.loss) for output in outputs])
    cosines = [output.cosine for output in outputs if output.cosine is not None]
    path = run_folder / FILE
    if loader.rank > 0 or _lines(path) >= _STEPS:
        return {}, ""
    each = np.array(by_rank).ravel()  # of micro-batch r * A + k
    batch = len(each) * loader.micro_batch
    found = np.full(batch, np.nan)
    if cosines:
        found = torch.stack(cosines).float().cpu().numpy()
        found = found.reshape(len(outputs), len(by_rank), -1).transpose(1, 0, 2).ravel()
    micro_batch = np.arange(batch) // loader.micro_batch
    # first images without a finite cosine, then those of micro-batches without a finite loss, then those far from their class
    suspects = np.lexsort((np.nan_to_num(found), np.isfinite(each[micro_batch]), np.isfinite(found)))[:_SAMPLES]
    ids, labels = loader.order.at(range(first, first + batch)), loader.global_labels(first, batch)
    samples = []
    for i in suspects:
        shard, key = loader.dataset.describe(int(ids[i]))
        said = {"sample_id": int(ids[i]), "label": int(labels[i]), "shard": shard, "key": key}
        said |= {"micro_batch": int(micro_batch[i])}
        samples.append(said | ({"cosine": _number(found[i])} if cosines else {}))
    counted = {"samples_in_batch": batch} | (
        {"samples_not_finite": int((~np.isfinite(found)).sum())} if cosines else {}
    )
    line = {
        **{name: _number(value) for name, value in where.items()},
        **counted,
        "micro_batch_losses": [_number(loss) for loss in each],
        "samples": samples,
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    which = f"it had {batch} samples"
    if cosines:
        which = f"{counted['samples_not_finite']} of its {batch} samples have no finite cosine"
    look_at = "them" if len(samples) == batch else "those to look at"
    return {**counted, "named_in": FILE}, f"{which}, {path} names {look_at}"


def _number(value: Any) -> Any:
    """JSON has no number for what is not finite."""
    if not isinstance(value, (float, np.floating)):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(float(value))


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
