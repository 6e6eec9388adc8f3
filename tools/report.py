"""Writes the report of a run as one self-contained HTML file: `python tools/report.py runs/NAME [-o report.html] [--beside runs/OTHER]`."""

from pathlib import Path
from typing import Annotated

import typer

from lvtrain.errors import one_line_errors


def main(
    run: Annotated[Path, typer.Argument(help="run folder, as a training leaves it (runs/NAME)")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="where to write; RUN/report.html by default")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(help="another run to draw beside it, with what differs; up to three times")
    ] = None,
    faces: Annotated[
        bool, typer.Option("--faces", help="draw landmarks and attention on real faces of the dataset, too")
    ] = False,
) -> None:
    """Writes loss, cosine, throughput, verification and events of a run as one HTML file that fetches nothing."""
    with one_line_errors("report", out or run):
        from lvtrain.report import write_report  # imports torch: not before --help has answered

        print(write_report(run, out, any_faces=faces, others=beside or []))


if __name__ == "__main__":
    typer.run(main)
