"""Checks a dataset folder: its structure in seconds, or with --full every hash, label and image.

With a fault the exit code is 2.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lvtrain.data.shards import ShardDataset
from lvtrain.datasets import contact_sheet
from lvtrain.datasets.verify import verify
from lvtrain.errors import EXIT_ERROR, one_line_errors


def main(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET")],
    full: Annotated[bool, typer.Option("--full", help="read everything: hashes, labels in the tars, images")] = False,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="processes of --full")] = os.cpu_count() or 1,
    sheet: Annotated[Path | None, typer.Option(help="draw a contact sheet (PNG) here")] = None,
) -> None:
    """Checks a dataset folder and lists every fault. With a fault the exit code is 2."""
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with one_line_errors("verify_dataset", sheet or dataset):
        with Progress(*columns, disable=not full) as bar:
            tasks: dict[str, Any] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done)

            verdict = verify(dataset, full=full, workers=workers, progress=show)
        for note in verdict.notes:
            typer.echo(f"note: {note}")
        for fault in verdict.faults:
            typer.echo(str(fault), err=True)
        if sheet and not verdict.faults:
            opened = ShardDataset(dataset)
            rows = contact_sheet.of_index(
                opened.index["label"], opened.label_names(), lambda sample: opened.read(sample)[0]
            )
            typer.echo(
                contact_sheet.draw(
                    rows, f"{dataset.name}: {len(opened)} images of {opened.num_classes} identities", sheet
                )
            )
    checked = "every byte" if full else "structure; --full reads every byte"
    summary = f"{dataset}: {verdict.identities} identities, {verdict.samples} samples, {verdict.shards} shard(s)"
    if verdict.faults:
        typer.echo(f"{summary}: {len(verdict.faults)} fault(s) ({checked})", err=True)
        raise typer.Exit(EXIT_ERROR)
    typer.echo(f"{summary}: sound ({checked})")


if __name__ == "__main__":
    typer.run(main)
