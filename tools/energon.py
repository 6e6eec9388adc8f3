"""Metadata beside a packed dataset with which Megatron Energon opens it: DATASET/.nv-meta, and an .idx for each shard.

No tar is read, and the dataset's fingerprint stays. Then: megatron.energon.get_train_dataset(DATASET, ...).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvtrain.errors import one_line_errors


def main(dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="a folder with dataset.json")]) -> None:
    """Writes the metadata with which Megatron Energon opens DATASET. No tar is read, and the dataset's fingerprint stays."""
    with one_line_errors("energon", dataset):
        from lvtrain.datasets.energon import write_energon

        typer.echo(f"{write_energon(dataset)}: written")


if __name__ == "__main__":
    typer.run(main)
