"""Writes the report of a run as one HTML file: `python tools/report.py runs/NAME [-o report.html] [--beside runs/OTHER]`."""

from pathlib import Path
from typing import Annotated

import typer

from lvtrain.errors import one_line_errors


def main(
    run: Annotated[Path, typer.Argument(help="folder of the run (runs/NAME)")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="file to write; default: RUN/report.html")] = None,
    beside: Annotated[list[Path] | None, typer.Option(help="another run to compare with; up to three times")] = None,
    faces: Annotated[
        bool, typer.Option("--faces", help="also draw landmarks and attention on real faces of the dataset")
    ] = False,
) -> None:
    """Writes loss, cosine, speed, verification and events of a run as one HTML file that loads nothing from the network."""
    with one_line_errors("report", out or run):
        from lvtrain.report import write_report  # here, because it imports torch: --help answers at once

        print(write_report(run, out, any_faces=faces, others=beside or []))


if __name__ == "__main__":
    typer.run(main)
