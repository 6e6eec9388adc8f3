"""Generates faces.

OUT/train has shards to train on, OUT/heldout other identities, and OUT/heldout.bin verification pairs of these.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lvtrain.errors import one_line_errors


def main(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    identities: Annotated[int, typer.Option(help="identities to train on")] = 500,
    images: Annotated[int, typer.Option(help="images of each identity")] = 16,
    heldout: Annotated[int, typer.Option(help="identities that are not trained on")] = 60,
    pairs: Annotated[int, typer.Option(help="verification pairs, a multiple of 20")] = 3000,
    seed: int = 0,
    difficulty: Annotated[str, typer.Option(help="normal, hard or album")] = "normal",
    heldout_images: Annotated[
        int | None, typer.Option(help="images of each held-out identity; default: as --images, at least 2")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="processes; the bytes do not depend on it")] = 2,
) -> None:
    """Generates faces: a training dataset, a held-out dataset, and verification pairs."""
    # imported here, so that --help answers at once
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lvtrain.datasets.synthetic import heldout_pairs, write_faces
    from lvtrain.evaluation.bins import write_bin

    start = time.perf_counter()
    with one_line_errors("synth_faces", out):
        heldout_images = max(images, 2) if heldout_images is None else heldout_images
        chosen, same = heldout_pairs(heldout, heldout_images, pairs, seed)
        columns = (TextColumn("faces"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task("faces", total=identities * images + heldout * heldout_images)
            written = write_faces(
                out, identities=identities, images=images, heldout=heldout, seed=seed, difficulty=difficulty,
                heldout_images=heldout_images, workers=workers,
                progress=lambda done, _: bar.update(task, completed=done),
            )  # fmt: skip
        flat = [written.heldout_images[person][image] for person, image in chosen.reshape(-1, 2).tolist()]
        write_bin(
            out / "heldout.bin",
            flat,
            same,
            about={
                "kind": "generated faces",
                "seed": seed,
                "difficulty": difficulty,
                "alignment": "generated in place",
            },
        )
    seconds = time.perf_counter() - start
    total = written.train.samples + written.heldout.samples
    typer.echo(
        f"{written.train.num_classes} identities, {written.train.samples} images in {out / 'train'}; "
        f"{written.heldout.num_classes} unseen, {pairs} pairs in {out / 'heldout.bin'}; {total / seconds:.0f} images/s"
    )


if __name__ == "__main__":
    typer.run(main)
