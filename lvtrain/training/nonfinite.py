"""`nonfinite.jsonl`: which images were in the batch of a step whose loss or gradient was not finite.

The position alone says which images they were. Where the method computes cosines, each image has that to its own class
centre; it is not finite where the embedding is not. Only the first steps of a run are noted, and of each step only the
images that are most likely the cause.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvtrain.data import Loader
from lvtrain.distributed import world as worlds
from lvtrain.methods import LossOutput

FILE = "nonfinite.jsonl"
_STEPS, _SAMPLES = 8, 32


def note_batch(
    run_folder: Path,
    loader: Loader,
    first: int,
    outputs: list[LossOutput],
    where: dict[str, Any],
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
        found = (
            torch.stack(cosines)
            .float()
            .cpu()
            .numpy()
            .reshape(len(outputs), len(by_rank), -1)
            .transpose(1, 0, 2)
            .ravel()
        )
    micro_batch = np.arange(batch) // loader.micro_batch
    # first images without a finite cosine, then those of micro-batches without a finite loss, then those far from their class
    suspects = np.lexsort((np.nan_to_num(found), np.isfinite(each[micro_batch]), np.isfinite(found)))[:_SAMPLES]
    ids, labels = loader.order.at(range(first, first + batch)), loader.global_labels(first, batch)
    samples = []
    for i in suspects:
        shard, key = loader.dataset.describe(int(ids[i]))
        said = {
            "sample_id": int(ids[i]),
            "label": int(labels[i]),
            "shard": shard,
            "key": key,
            "micro_batch": int(micro_batch[i]),
        }
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
    which = (
        f"{counted['samples_not_finite']} of its {batch} samples have no finite cosine"
        if cosines
        else f"it had {batch} samples"
    )
    return {
        **counted,
        "named_in": FILE,
    }, f"{which}, {path} names {'them' if len(samples) == batch else 'those to look at'}"


def _number(value: Any) -> Any:
    """JSON has no number for what is not finite."""
    if not isinstance(value, (float, np.floating)):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(float(value))


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
