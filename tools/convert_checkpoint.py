"""Weights in and out.

\b
import SOURCE OUT                others' weights -> a folder that load_model,
                                 evaluate and init_from take
consolidate SOURCE OUT           a run, a checkpoint or a DeepSpeed ZeRO folder
                                 -> one such folder; no GPU, no ranks
reshard SOURCE --out OUT         class rows -> arcface_torch's files of N ranks
        --ranks N                (--ranks 1: one file)
export SOURCE OUT --to FORMAT    onnx, arcface, folder or insightface
check FILE.onnx                  would insightface, lvface, uniface and
                                 MFR-Ongoing take it?

\b
python tools/convert_checkpoint.py export runs/mine mine.onnx --to onnx
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lvtrain.errors import EXIT_ERROR, UserError

app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False
)
Source = Annotated[
    Path,
    typer.Argument(help="run, checkpoint, exported folder, .pt/.pth/.ckpt/.safetensors, or .onnx where it says so"),
]
Out = Annotated[Path, typer.Argument(help="folder or file to write")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        print(f"convert_checkpoint: error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_ERROR) from None


@app.command("import")
def import_(
    source: Source,
    out: Out,
    branch: Annotated[str | None, typer.Option(help="teacher or student of a self-supervised checkpoint")] = None,
    rank_files: Annotated[
        list[Path] | None,
        typer.Option("--rank-file", help="checkpoint_gpu_N.pt of every rank in order: their class rows too"),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="checked against the merged class rows")] = None,
    bgr: Annotated[
        bool | None,
        typer.Option(
            "--bgr/--rgb",
            help="colour order the weights want; BGR weights are turned into RGB ones. Default: what the file says, else RGB",
        ),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="attention heads of a ViT of no published size")] = None,
    licence: Annotated[
        str | None, typer.Option(help="of the data the weights were trained on, for the model card")
    ] = None,
) -> None:
    """Others' weights: arcface_torch, LVFace, CVLface, AdaFace, LAFS, DINO, safetensors."""
    from lvtrain.interop.architecture import fit, recognise
    from lvtrain.interop.foreign import swap_colours
    from lvtrain.interop.packages import merge_rows, write_folder
    from lvtrain.interop.reading import read_weights

    with one_line_errors():
        weights = read_weights(source, branch=branch)
        if not weights.backbone:
            raise UserError(f"{source} holds {weights.kind}, no backbone; use `reshard` for class rows")
        turned = weights.bgr if bgr is None else bgr
        if turned:
            weights.backbone = swap_colours(weights.backbone)
        architecture = recognise(weights.backbone, heads=heads)
        report = fit(architecture.create(), weights.backbone)
        rows = None
        if rank_files:
            parts = [read_weights(file).rows for file in rank_files]
            if any(part is None for part in parts):
                raise UserError("a --rank-file holds no class rows")
            rows = merge_rows([part for part in parts if part is not None], num_classes=num_classes)
        card = _card(out.name, architecture, weights.backbone)
        card.source, card.data_licence = f"{weights.kind}, {source.name}", licence
        write_folder(out, architecture, weights.backbone, card=card, rows=rows)
        print(
            f"{weights.kind}: {architecture.name}, {architecture.embedding_dim} numbers, image {architecture.image_size}; {report}"
        )
        if weights.dropped:
            print(
                f"left out: {len(weights.dropped)} tensors that are no backbone ({', '.join(weights.dropped[:3])} ...)"
            )
        if turned:
            print(
                "input: it wanted BGR; red and blue were exchanged in its first layer, so it takes RGB now, (x - 127.5) / 127.5"
            )
        else:
            print(
                "input: RGB, (x - 127.5) / 127.5, unless its authors say otherwise (LAFS's MS1MV3 weights want BGR: --bgr); evaluate it to be sure"
            )
        print(f"written: {out}" + (f" with {len(rows)} class rows" if rows is not None else ""))


@app.command()
def consolidate(
    source: Source,
    out: Out,
    rows: Annotated[bool, typer.Option(help="write the class rows too")] = False,
    average: Annotated[bool, typer.Option(help="the moving average of the weights")] = False,
    tag: Annotated[str | None, typer.Option(help="tag of a DeepSpeed folder")] = None,
    heads: Annotated[
        int | None, typer.Option(help="attention heads, if a DeepSpeed folder holds a ViT of no published size")
    ] = None,
) -> None:
    """One float32 folder from a run, a checkpoint or a DeepSpeed ZeRO folder."""
    from lvtrain.interop.architecture import recognise
    from lvtrain.interop.models import open_backbone
    from lvtrain.interop.packages import read_deepspeed, write_folder
    from lvtrain.interop.reading import strip_wrappers

    with one_line_errors():
        class_rows = None
        if (source / "latest").is_file() or tag is not None:
            state = strip_wrappers(read_deepspeed(source, tag))
            architecture = recognise(state, heads=heads)
            card = _card(out.name, architecture, state)
        else:
            architecture, state, weights = open_backbone(source, average=average)
            card = _source_card(source, architecture, state, weights)
            if rows:
                class_rows = _class_rows(source)
        write_folder(out, architecture, state, card=card, rows=class_rows)
        print(
            f"written: {out} ({architecture.name}, {len(state)} tensors"
            + (f", {len(class_rows)} class rows)" if class_rows is not None else ")")
        )


@app.command()
def reshard(
    source: Annotated[
        list[Path], typer.Argument(help="a run or checkpoint of ours, or arcface_torch's files of all ranks in order")
    ],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    ranks: Annotated[int, typer.Option(min=1, help="files to write")] = 1,
    num_classes: Annotated[int | None, typer.Option(help="refuse another total")] = None,
) -> None:
    """Class rows for another number of ranks: rank_{r}_softmax_weight.pt, arcface_torch's split."""
    import torch

    from lvtrain.interop.packages import merge_rows, split_rows
    from lvtrain.interop.reading import read_weights

    with one_line_errors():
        if len(source) == 1 and source[0].is_dir():
            whole = _class_rows(source[0])
            if num_classes not in (None, len(whole)):
                raise UserError(f"{source[0]} has {len(whole)} class rows, not {num_classes}")
        else:
            parts = [read_weights(file).rows for file in source]
            empty = [str(file) for file, part in zip(source, parts) if part is None]
            if empty:
                raise UserError(f"{empty[0]} holds no class rows")
            whole = merge_rows([part for part in parts if part is not None], num_classes=num_classes)
        out.mkdir(parents=True, exist_ok=True)
        for rank, part in enumerate(split_rows(whole, ranks)):
            torch.save(part, out / f"rank_{rank}_softmax_weight.pt")
        print(f"written: {len(whole)} class rows as {ranks} file{'s' if ranks > 1 else ''} in {out}")


@app.command()
def export(
    source: Source,
    out: Out,
    to: Annotated[Literal["onnx", "arcface", "folder", "insightface"], typer.Option(help="format")] = "onnx",
    opset: Annotated[int, typer.Option(help="ONNX opset, 14 (what MFR-Ongoing takes) to 20")] = 18,
    precision: Annotated[Literal["float32", "float16", "int8"], typer.Option(help="of the ONNX weights")] = "float32",
    average: Annotated[bool, typer.Option(help="the moving average of the weights")] = False,
) -> None:
    """The backbone for others' programs, checked after writing."""
    from lvtrain.interop.model_card import write_card
    from lvtrain.interop.models import open_backbone
    from lvtrain.interop.packages import write_arcface, write_folder, write_insightface

    with one_line_errors():
        architecture, state, weights = open_backbone(source, average=average)
        if to == "arcface":
            write_arcface(out, state)
        elif to == "folder":
            write_folder(out, architecture, state, card=_source_card(source, architecture, state, weights))
        elif to == "onnx":
            _onnx(architecture, state, out, opset, precision)
        else:
            card = _source_card(source, architecture, state, weights)
            out.mkdir(parents=True, exist_ok=True)
            _onnx(architecture, state, out / "recognition.onnx", opset, precision)
            licence = f"Licence of the training data, which these weights inherit: {card.data_licence or 'not stated'}"
            write_insightface(
                out,
                out / "recognition.onnx",
                model_id=out.name,
                embedding_dim=architecture.embedding_dim,
                image_size=architecture.image_size,
                licence=licence,
            )
            write_card(out / "README.md", card)
        print(f"written: {out}")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="any ONNX file")],
    client: Annotated[
        list[str] | None,
        typer.Option(help="whose refusal is an error; once for each of insightface, lvface, uniface, MFR-Ongoing"),
    ] = None,
) -> None:
    """Which clients would take this ONNX file, and why not.

    Exit status 1 if a client named with --client refuses; without it, insightface, lvface or uniface. MFR-Ongoing's server is offline: its rules are
    shown, and count only when it is named.
    """
    from rich.console import Console
    from rich.table import Table

    from lvtrain.interop.clients import CLIENTS, LIVING
    from lvtrain.interop.clients import check as verdicts_of

    with one_line_errors():
        for name in client or ():
            if name not in CLIENTS:
                raise UserError(f"client {name} is unknown; known: {', '.join(CLIENTS)}")
        verdicts = verdicts_of(file)
    table = Table("client", "verdict", "why", title=str(file))
    for verdict in verdicts:
        table.add_row(verdict.client, "accepts" if verdict.accepted else "refuses", "\n".join(verdict.reasons))
    Console(width=160).print(table)
    raise SystemExit(0 if all(verdict.accepted for verdict in verdicts if verdict.client in (client or LIVING)) else 1)


def _onnx(architecture: Any, state: Any, out: Path, opset: int, precision: str) -> None:
    from lvtrain.interop import onnx_export
    from lvtrain.interop.architecture import fit

    backbone = architecture.create()
    fit(backbone, state)
    plain = out if precision == "float32" else out.with_suffix(".float32.onnx")
    parity = onnx_export.export_onnx(backbone, plain, image_size=architecture.image_size, opset=opset)
    print(
        f"float32 against torch, N = {parity.batches}: largest difference {parity.largest_difference:.1e}, cosine at least {parity.smallest_cosine:.7f}"
    )
    if precision != "float32":
        (onnx_export.to_float16 if precision == "float16" else onnx_export.to_int8)(plain, out)
        plain.unlink()
        narrow = onnx_export.compare(backbone, out, image_size=architecture.image_size)
        print(
            f"{precision} against torch: largest difference {narrow.largest_difference:.1e}, "
            f"cosine at least {narrow.smallest_cosine:.5f}, {out.stat().st_size / 1e6:.1f} MB"
        )


def _class_rows(source: Path) -> Any:
    from lvtrain.training.checkpoint_reader import open_weights

    reader = open_weights(source).reader
    if "classifier.weight" not in reader.names:
        raise UserError(f"{source} has no class rows (a self-supervised run)")
    return reader.rows("classifier.weight", 0, reader.shape("classifier.weight")[0])


def _card(name: str, architecture: Any, state: Any) -> Any:
    from lvtrain.interop.model_card import Card

    return Card(name, architecture.name, architecture.embedding_dim, sum(tensor.numel() for tensor in state.values()))


def _source_card(source: Path, architecture: Any, state: Any, weights: str) -> Any:
    """The card of a run, of an exported folder, or one that says what can be seen in the weights."""
    from lvtrain.interop.model_card import from_folder, from_run

    if source.is_dir() and (card := from_folder(source)) is not None:
        return card
    run = source if (source / "recipe.yaml").is_file() else source.parent.parent
    if not (run / "recipe.yaml").is_file():
        return _card(source.name, architecture, state)
    parameters = sum(tensor.numel() for tensor in state.values())
    card = from_run(
        run,
        architecture=architecture.name,
        embedding_dim=architecture.embedding_dim,
        parameters=parameters,
        weights=weights,
    )
    if card.stale:
        print(f"no thresholds in the model card: {card.stale}")
    return card


if __name__ == "__main__":
    app()
