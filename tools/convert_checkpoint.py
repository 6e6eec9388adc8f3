"""Reads and writes weights of other projects.

\b
import SOURCE OUT                weights of another project -> a folder for
                                 load_model, evaluate and init_from
consolidate SOURCE OUT           a run, a checkpoint or a DeepSpeed ZeRO folder
                                 -> such a folder; needs no GPU
reshard SOURCE --out OUT         class centres -> arcface_torch's files of
        --ranks N                N ranks (--ranks 1: one file)
export SOURCE OUT --to FORMAT    onnx, arcface, folder or insightface
check FILE.onnx                  would insightface, lvface, uniface and
                                 MFR-Ongoing accept it?

\b
python tools/convert_checkpoint.py export runs/mine mine.onnx --to onnx
"""  # noqa: D301 (click's mark of a paragraph that is not wrapped)

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lvtrain.errors import UserError, one_line_errors

app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False
)
Source = Annotated[
    Path,
    typer.Argument(help="run, checkpoint, exported folder, .pt, .pth, .ckpt, .safetensors or .onnx"),
]
Out = Annotated[Path, typer.Argument(help="folder or file to write")]


@app.command("import")
def import_(
    source: Source,
    out: Out,
    branch: Annotated[str | None, typer.Option(help="teacher or student of a self-supervised checkpoint")] = None,
    rank_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--rank-file",
            help="file of class centres of one rank, such as softmax_fc_gpu_0.pt; repeat it for every rank, in order",
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="number of identities; checked against the merged class centres")
    ] = None,
    bgr: Annotated[
        bool | None,
        typer.Option(
            "--bgr/--rgb",
            help="colour order that the weights need; BGR weights are turned into RGB weights. Default: what the file says, else RGB",
        ),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="number of attention heads, if a ViT has no published size")] = None,
    licence: Annotated[
        str | None, typer.Option(help="licence of the data that the weights were trained on, for the model card")
    ] = None,
) -> None:
    """Imports weights: arcface_torch, LVFace, CVLface, AdaFace, LAFS, DINO, safetensors, ONNX packs of insightface."""
    from lvtrain.export import convert

    with one_line_errors("convert_checkpoint", out):
        convert.import_weights(
            source,
            out,
            branch=branch,
            rank_files=rank_files or (),
            num_classes=num_classes,
            bgr=bgr,
            heads=heads,
            licence=licence,
        )


@app.command()
def consolidate(
    source: Source,
    out: Out,
    rows: Annotated[bool, typer.Option(help="also write the class centres")] = False,
    average: Annotated[bool, typer.Option(help="take the moving average of the weights")] = False,
    tag: Annotated[str | None, typer.Option(help="tag of a DeepSpeed folder")] = None,
    heads: Annotated[
        int | None, typer.Option(help="number of attention heads, if a DeepSpeed folder has a ViT of no published size")
    ] = None,
) -> None:
    """Writes one float32 folder from a run, a checkpoint or a DeepSpeed ZeRO folder.

    DeepSpeed's own script unpickles a DeepSpeed folder. That could run code: give it only a folder that you trust.
    """
    from lvtrain.export import convert

    with one_line_errors("convert_checkpoint", out):
        convert.consolidate(source, out, rows=rows, average=average, tag=tag, heads=heads)


@app.command()
def reshard(
    source: Annotated[
        list[Path],
        typer.Argument(help="a run or checkpoint of lvtrain, or arcface_torch's files of all ranks, in order"),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    ranks: Annotated[int, typer.Option(min=1, help="number of files to write")] = 1,
    num_classes: Annotated[int | None, typer.Option(help="number of identities; another number is refused")] = None,
) -> None:
    """Writes class centres for another number of ranks, as arcface_torch's rank_{r}_softmax_weight.pt."""
    from lvtrain.export import convert

    with one_line_errors("convert_checkpoint", out):
        convert.reshard(source, out, ranks=ranks, num_classes=num_classes)


@app.command()
def export(
    source: Source,
    out: Out,
    to: Annotated[Literal["onnx", "arcface", "folder", "insightface"], typer.Option(help="format")] = "onnx",
    opset: Annotated[int, typer.Option(help="ONNX opset, 14 (what MFR-Ongoing takes) to 20")] = 18,
    precision: Annotated[
        Literal["float32", "float16", "int8"], typer.Option(help="number format of the ONNX weights")
    ] = "float32",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="number of images that the ONNX file takes at once, for small devices. Default: any number"
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="with int8: images that give the scales (static int8): a dataset, a folder with one folder per identity, or a .bin; "
            "OUT.layers.json compares each layer with float32"
        ),
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(help=".bin set on which the accuracy of the ONNX file and of the weights is compared")
    ] = None,
    average: Annotated[bool, typer.Option(help="take the moving average of the weights")] = False,
    purpose: Annotated[
        Literal["commercial"] | None,
        typer.Option("--for", help="refuse if a licence that the weights inherit does not allow it"),
    ] = None,
) -> None:
    """Writes the backbone for other programs, and checks the file."""
    from lvtrain.export import convert

    with one_line_errors("convert_checkpoint", out):
        convert.export(
            source,
            out,
            to=to,
            opset=opset,
            precision=precision,
            batch=batch,
            calibration=calibration,
            benchmark=benchmark,
            average=average,
            purpose=purpose,
        )


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="any ONNX file")],
    client: Annotated[
        list[str] | None,
        typer.Option(help="insightface, lvface, uniface or MFR-Ongoing; its refusal is an error. Repeat it for more"),
    ] = None,
) -> None:
    """Says which client programs would accept this ONNX file, and if not, why.

    Exit status 1 if a client of --client refuses; without --client, if insightface, lvface or uniface does. MFR-Ongoing's server is offline: its
    rules are shown, but count only with --client MFR-Ongoing.
    """
    from rich.console import Console
    from rich.table import Table

    from lvtrain.export.clients import CLIENTS, LIVING
    from lvtrain.export.clients import check as verdicts_of

    with one_line_errors("convert_checkpoint", file):
        for name in client or ():
            if name not in CLIENTS:
                raise UserError(f"client {name} is unknown; known: {', '.join(CLIENTS)}")
        verdicts = verdicts_of(file)
    table = Table("client", "verdict", "why", title=str(file))
    for verdict in verdicts:
        table.add_row(verdict.client, "accepts" if verdict.accepted else "refuses", "\n".join(verdict.reasons))
    Console(width=160).print(table)
    raise SystemExit(0 if all(verdict.accepted for verdict in verdicts if verdict.client in (client or LIVING)) else 1)


if __name__ == "__main__":
    app()
