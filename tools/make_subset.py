"""Writes a subset of a dataset as a manifest, for data.path. No image is copied.

python tools/make_subset.py DATASET OUT.json --fraction 0.1 --shots 4 --seed 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvtrain.data.shards import ShardDataset
from lvtrain.datasets.subset import choose, write_subset
from lvtrain.errors import UserError, one_line_errors
from lvtrain.files.reading import read_lines


def main(
    dataset: Annotated[Path, typer.Argument(help="dataset folder, or a subset to choose from")],
    out: Annotated[Path, typer.Argument(help="manifest to write, NAME.json")],
    fraction: Annotated[float, typer.Option(help="share of the identities")] = 1.0,
    shots: Annotated[int | None, typer.Option(help="largest number of images per identity")] = None,
    min_images: Annotated[int, typer.Option(help="leave out identities with fewer images")] = 1,
    identities: Annotated[Path | None, typer.Option(help="file of identity names to keep, one per line")] = None,
    without_identities: Annotated[Path | None, typer.Option(help="file of identity names to leave out")] = None,
    without_samples: Annotated[Path | None, typer.Option(help="file of sample ids to leave out")] = None,
    seed: Annotated[int, typer.Option(help="with the same seed, a smaller subset is part of a larger one")] = 0,
) -> None:
    """Writes a subset of a dataset as a manifest, for data.path. No image is copied."""
    with one_line_errors("make_subset", out):
        whole = ShardDataset(dataset)
        ids = choose(
            whole,
            fraction=fraction,
            shots=shots,
            min_images=min_images,
            identities=_lines(identities),
            without_identities=_lines(without_identities) or (),
            without_samples=_numbers(without_samples),
            seed=seed,
        )
        criteria = {
            "fraction": fraction,
            "shots": shots,
            "min_images": min_images,
            **{
                name: str(path)
                for name, path in [
                    ("identities", identities),
                    ("without_identities", without_identities),
                    ("without_samples", without_samples),
                ]
                if path
            },
        }
        write_subset(out, whole, ids, criteria=criteria, seed=seed)
        subset = ShardDataset(out)
        typer.echo(f"{out}: {len(subset)} images of {subset.num_classes} identities, fingerprint {subset.fingerprint}")


def _lines(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        return [line for line in read_lines(path) if line]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; correct the path of the list") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; write names of labels.txt, one per line") from None


def _numbers(path: Path | None) -> list[int]:
    try:
        return [int(line) for line in _lines(path) or ()]
    except ValueError as error:
        raise UserError(f"{path} must hold one sample id per line ({error})") from None


if __name__ == "__main__":
    typer.run(main)
