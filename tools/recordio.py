"""RecordIO for other trainers: writes a dataset as train.rec, or chooses records of a train.rec for DALI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from lvtrain.data.shards import ShardDataset
from lvtrain.datasets.recordio.export import filter_index, write_recordio
from lvtrain.errors import UserError, one_line_errors

app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def write(
    dataset: Annotated[Path, typer.Argument(help="dataset folder or subset manifest")],
    out: Annotated[Path, typer.Argument(help="OUT.rec; OUT.idx and property are written next to it")],
) -> None:
    """Writes a dataset or subset as train.rec, train.idx and property."""
    with one_line_errors("recordio", out):
        opened = ShardDataset(dataset)
        with Progress() as bar:
            task = bar.add_task("images", total=len(opened))
            count = write_recordio(opened, out, progress=lambda done, _: bar.update(task, completed=done))
    typer.echo(f"{out}: {count} images of {opened.num_classes} identities")


@app.command("filter")
def filter_(
    rec: Annotated[Path, typer.Argument(help="existing .rec; it is not changed")],
    out: Annotated[Path, typer.Argument(help="OUT.idx")],
    identities: Annotated[Path | None, typer.Option(help="file of labels to keep, one per line")] = None,
    without_keys: Annotated[Path | None, typer.Option(help="file of record keys to leave out, one per line")] = None,
    min_images: Annotated[int, typer.Option(help="leave out identities with fewer")] = 1,
    shots: Annotated[int | None, typer.Option(help="images per identity, at most")] = None,
    seed: int = 0,
) -> None:
    """Writes an .idx of some image records of a .rec, which does not change."""
    with one_line_errors("recordio", out):
        images, found = filter_index(
            rec,
            out,
            identities=_numbers(identities),
            min_images=min_images,
            shots=shots,
            without_keys=_numbers(without_keys) or (),
            seed=seed,
        )
    typer.echo(
        f"{out}: {images} images of {found} identities; read it with fn.readers.mxnet(path=[{str(rec)!r}], index_path=[{str(out)!r}])"
    )


def _numbers(path: Path | None) -> list[int] | None:
    if path is None:
        return None
    try:
        return [int(line) for line in path.read_text().split()]
    except ValueError as error:
        raise UserError(f"{path} must hold one whole number per line ({error})") from None


if __name__ == "__main__":
    app()
