"""Embeds a folder of images or a packed dataset: SRC to OUT.npy (float32 [N, d], rows of unit length) OUT.csv, which names the rows, and OUT.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lvtrain.errors import one_line_errors

_SHOWN = 5


def main(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="folder of images, dataset, or subset manifest (.json)")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.npy")],
    model: Annotated[
        Path, typer.Option("-m", "--model", help="run, checkpoint, exported folder, .pt, .safetensors, .onnx, or pack")
    ],
    batch: Annotated[int, typer.Option(min=1, help="images per forward call")] = 64,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="add the mirrored image's embedding, as evaluation does")
    ] = False,
    align: Annotated[bool, typer.Option("--align", help="photographs: find the largest face and align it")] = False,
    average: Annotated[
        bool, typer.Option("--average", help="take a run's moving average of the weights (ema)")
    ] = False,
    input_: Annotated[
        str,
        typer.Option(
            "--input", metavar="WORDS", help='how the model takes images, if its file does not say so: "bgr 0..255"'
        ),
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT.npy, .csv and .json")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="do not use a GPU")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Embeds the images of SRC, which must be aligned faces. OUT.csv names the rows (row,name,identity,error).

    An image that cannot be read keeps its row, as zeros, and OUT.csv says why.
    """
    with one_line_errors("embed", out, debug=debug):
        # imported here, because they import torch: --help answers at once
        import numpy as np
        import torch
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        import lvtrain
        from lvtrain.evaluation.spread import warning_of
        from lvtrain.export.embeddings import check_out, embed_images, list_images
        from lvtrain.weights.space import space_of

        check_out(out, source, overwrite=overwrite)
        listing = list_images(source)
        device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
        opened = lvtrain.load_model(model, device=device, average=average, takes=input_)
        typer.echo(opened.takes.line())
        with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=len(listing.images))
            done = embed_images(
                opened, listing, out, space=space_of(model, average=average), batch=batch, mirror=mirror, align=align, overwrite=overwrite,
                progress=lambda rows: bar.update(task, completed=rows),
            )  # fmt: skip
        if warning := warning_of(np.load(out, mmap_mode="r"), without=done.errors):
            print(f"embed: warning: {warning}", file=sys.stderr)
    for row in sorted(done.errors)[:_SHOWN]:
        print(f"embed: row {row} is zeros: {done.errors[row]}", file=sys.stderr)
    if len(done.errors) > _SHOWN:
        print(f"embed: {len(done.errors) - _SHOWN} more rows are zeros; {done.names} lists them", file=sys.stderr)
    failed = len(done.errors)
    typer.echo(
        f"{out}: float32 [{done.rows}, {done.embedding_dim}], unit length, by {opened.name}; names in {done.names}"
    )
    typer.echo(
        f"  found {done.rows} = embedded {done.rows - failed} + unreadable {failed}; left out {listing.left_out} other files"
    )


if __name__ == "__main__":
    typer.run(main)
