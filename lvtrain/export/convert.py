"""Conversions from files to files, for `tools/convert_checkpoint.py`. They print what they did."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lvtrain.errors import UserError
from lvtrain.export import onnx_export, quantise
from lvtrain.export.annotate import annotate
from lvtrain.export.model_card import Card, bare, for_weights, write_card
from lvtrain.export.packages import (
    merge_rows,
    read_deepspeed,
    save,
    split_rows,
    write_arcface,
    write_folder,
    write_insightface,
)
from lvtrain.weights.architecture import Architecture, fit, recognise
from lvtrain.weights.foreign import swap_colours
from lvtrain.weights.models import finite
from lvtrain.weights.provenance import from_json
from lvtrain.weights.reading import read_weights, strip_wrappers
from lvtrain.weights.source import open_source

Precision = Literal["float32", "float16", "int8"]

_LEAST_COSINE = 0.9  # between embeddings of a float16 or int8 file and torch's; int8 reaches 0.97 on weights that were never trained


def import_weights(
    source: Path,
    out: Path,
    *,
    branch: str | None = None,
    rank_files: Sequence[Path] = (),
    num_classes: int | None = None,
    bgr: bool | None = None,
    heads: int | None = None,
    licence: str | None = None,
) -> None:
    """Turns another project's weights into our folder, float32, RGB.

    Args:
        source: file of weights; see `lvtrain.weights.reading` for the kinds that are read.
        out: folder to write.
        branch: teacher or student of a self-supervised checkpoint.
        rank_files: `checkpoint_gpu_N.pt` of every rank in order; their class centres go into the folder too.
        num_classes: number of class centres that `rank_files` must add up to.
        bgr: the weights expect blue before red; None takes what the file says.
        heads: attention heads of a ViT of no published size.
        licence: of the data they were trained on.

    Raises:
        UserError: the file holds no backbone that we have, or class centres that do not belong together.
    """
    weights = read_weights(source, branch=branch)
    if not weights.backbone:
        raise UserError(f"{source} holds {weights.kind} and no backbone; use `reshard` for class centres")
    finite(weights.backbone, source)
    turned = weights.bgr if bgr is None else bgr
    state = swap_colours(weights.backbone) if turned else weights.backbone
    architecture = recognise(state, heads=heads)
    report = fit(architecture.create(), state)
    rows = _rows_of_ranks(rank_files, num_classes) if rank_files else None
    card = bare(out.name, architecture, state, f"{weights.kind}, {source.name}", path=source, licence=licence)
    write_folder(out, architecture, state, card=card, rows=rows)
    size = f"{architecture.embedding_dim} numbers, image {architecture.image_size}"
    print(f"{weights.kind}: {architecture.name}, {size}; {report}")
    if weights.dropped:
        names = ", ".join(weights.dropped[:3])
        print(f"left out: {len(weights.dropped)} tensors that do not belong to the backbone ({names} ...)")
    if turned:
        print(
            "input: the file expected BGR; red and blue were exchanged in its first layer, so it takes RGB now, "
            "(x - 127.5) / 127.5"
        )
    else:
        print(
            "input: RGB, (x - 127.5) / 127.5, unless its authors say otherwise (LAFS's MS1MV3 weights take BGR: --bgr); "
            "evaluate it to be sure"
        )
    print(f"written: {out}" + (f" with {len(rows)} class centres" if rows is not None else ""))


def consolidate(
    source: Path,
    out: Path,
    *,
    rows: bool = False,
    average: bool = False,
    tag: str | None = None,
    heads: int | None = None,
) -> None:
    """Turns a run, a checkpoint or a DeepSpeed ZeRO folder into our folder, float32, in this process.

    Args:
        source: run, checkpoint or DeepSpeed folder.
        out: folder to write.
        rows: write the class centres too.
        average: take the moving average of the weights.
        tag: tag of a DeepSpeed folder; None takes its latest.
        heads: attention heads, if a DeepSpeed folder holds a ViT of no published size.

    Raises:
        UserError: nothing usable at `source`, or `rows` is set and `source` has no class centres.
    """
    class_rows = None
    if (source / "latest").is_file() or tag is not None:
        if rows:
            raise UserError(f"{source} is a DeepSpeed folder; class centres are read from runs and checkpoints of ours")
        state = strip_wrappers(read_deepspeed(source, tag))
        architecture = recognise(state, heads=heads)
        card = bare(out.name, architecture, state, f"DeepSpeed checkpoint {source.name}", path=source)
    else:
        opened = open_source(source, average=average)
        architecture, state, weights = opened.architecture(), opened.state(), opened.kind
        card = for_weights(source, architecture, state, weights)
        class_rows = read_rows(source) if rows else None
    finite(state, source)
    write_folder(out, architecture, state, card=card, rows=class_rows)
    if card.stale:
        print(f"no thresholds in the model card: {card.stale}")
    with_rows = f", {len(class_rows)} class centres" if class_rows is not None else ""
    print(f"written: {out} ({architecture.name}, {len(state)} tensors{with_rows})")


def reshard(sources: Sequence[Path], out: Path, *, ranks: int = 1, num_classes: int | None = None) -> None:
    """Writes class centres as arcface_torch's files of `ranks` ranks, `rank_{r}_softmax_weight.pt`.

    Args:
        sources: one run or checkpoint of ours, or arcface_torch's files of every rank in order.
        out: folder to write.
        ranks: number of files.
        num_classes: number of class centres that there must be; None takes any.

    Raises:
        UserError: no class centres, or not `num_classes` of them.
    """
    if len(sources) == 1 and sources[0].is_dir():
        whole = read_rows(sources[0])
        if num_classes not in (None, len(whole)):
            raise UserError(f"{sources[0]} has {len(whole)} class centres, not {num_classes}")
    else:
        whole = _rows_of_ranks(sources, num_classes)
    out.mkdir(parents=True, exist_ok=True)
    for rank, part in enumerate(split_rows(whole, ranks)):
        save(part, out / f"rank_{rank}_softmax_weight.pt")
    print(f"written: {len(whole)} class centres as {ranks} file{'s' if ranks > 1 else ''} in {out}")


def export(
    source: Path,
    out: Path,
    *,
    to: Literal["onnx", "arcface", "folder", "insightface"] = "onnx",
    opset: int = 18,
    precision: Precision = "float32",
    batch: int | None = None,
    calibration: Path | None = None,
    benchmark: Path | None = None,
    average: bool = False,
    purpose: Literal["commercial"] | None = None,
) -> None:
    """Writes the backbone in another program's format and checks what was written.

    Args:
        source: anything that `open_source` takes: a run, a checkpoint, an exported folder or a file of weights.
        out: file or folder to write.
        to: format.
        opset: ONNX opset.
        precision: of the ONNX file's weights.
        batch: images an ONNX file takes at once; None for any number.
        calibration: images from which int8 takes the scales of activations (static int8); without, the scales are found
            anew for each input.
        benchmark: a `.bin` verification set on which the ONNX file's accuracy is compared with the backbone's.
        average: take the moving average of the weights.
        purpose: `commercial` refuses unless every licence that the weights inherit allows commercial use.

    Raises:
        UserError: nothing usable at `source`, or a file that does not agree with the backbone.
    """
    if calibration is not None and precision != "int8":
        raise UserError(f"calibration images are for int8, not for {precision}; add --precision int8")
    if to in ("arcface", "folder") and (precision, batch, benchmark) != ("float32", None, None):
        raise UserError(f"--precision, --batch and --benchmark are for ONNX files, not for --to {to}; leave them out")
    options = _OnnxOptions(opset, precision, batch, calibration, benchmark)
    opened = open_source(source, average=average)
    architecture, state, weights = opened.architecture(), opened.state(), opened.kind
    finite(state, source)
    card = for_weights(source, architecture, state, weights)
    if purpose == "commercial":
        from_json(card.provenance).check_commercial(str(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "arcface":
        write_arcface(out, state)
    elif to == "onnx":
        _write_onnx(architecture, state, out, options, card)
    else:
        if card.stale:
            print(f"no thresholds in the model card: {card.stale}")
        if to == "folder":
            write_folder(out, architecture, state, card=card)
        else:
            out.mkdir(exist_ok=True)
            card = _write_onnx(architecture, state, out / "recognition.onnx", options, card)
            licence = "; ".join(map(str, from_json(card.provenance).licences)) or card.data_licence
            write_insightface(out, out / "recognition.onnx", architecture, model_id=out.name, licence=licence)
            write_card(out / "README.md", card)
    print(f"written: {out}")


def read_rows(source: Path) -> torch.Tensor:
    """All class centres `[C, d]` of a run or a checkpoint of ours.

    Raises:
        UserError: it has none.
    """
    from lvtrain.checkpoint.reader import open_weights

    reader = open_weights(source).reader
    if "classifier.weight" not in reader.names:
        raise UserError(f"{source} has no class centres (a self-supervised run)")
    return reader.rows("classifier.weight", 0, reader.shape("classifier.weight")[0])


def _rows_of_ranks(files: Sequence[Path], num_classes: int | None) -> torch.Tensor:
    parts = []
    for file in files:
        rows = read_weights(file).rows
        if rows is None:
            raise UserError(f"{file} holds no class centres")
        parts.append(rows)
    return merge_rows(parts, num_classes=num_classes)


@dataclass(frozen=True)
class _OnnxOptions:
    """How `export` writes an ONNX file; see there."""

    opset: int
    precision: Precision
    batch: int | None
    calibration: Path | None
    benchmark: Path | None


def _write_onnx(
    architecture: Architecture, state: dict[str, torch.Tensor], out: Path, options: _OnnxOptions, card: Card
) -> Card:
    """Writes the file and returns its card."""
    backbone, size, precision = architecture.create(), architecture.image_size, options.precision
    fit(backbone, state)
    with tempfile.TemporaryDirectory(
        dir=out.parent, prefix=".export-"
    ) as room:  # a file that does not agree is never moved to `out`
        plain, made = Path(room) / "float32.onnx", Path(room) / out.name
        parity = onnx_export.export_onnx(backbone, plain, image_size=size, opset=options.opset, batch=options.batch)
        print(f"float32 against torch: {parity}")
        if precision == "float32":
            made = plain
        else:
            layers, parity = _narrow(backbone, plain, made, size, options)
            print(f"{precision} against torch: {parity}, {made.stat().st_size / 1e6:.1f} MB")
            if parity.smallest_cosine < _LEAST_COSINE:
                raise UserError(f"{precision} changes this backbone's embeddings too much; take another precision")
            if layers:
                table = out.with_suffix(".layers.json")
                table.write_text(json.dumps([asdict(layer) for layer in layers], indent=1) + "\n")
                worst = ", ".join(f"{layer.layer} {layer.cosine:.4f}" for layer in layers[:4])
                print(f"cosine of each layer's output to float32's: {worst}; all {len(layers)} in {table}")
        card = annotate(made, card, precision)
        made.replace(out)
    if options.benchmark is not None:
        torchs, files = onnx_export.accuracies(backbone, out, options.benchmark, image_size=size)
        print(
            f"accuracy on {options.benchmark}: {100 * torchs:.2f}% by torch, {100 * files:.2f}% by the {precision} file ({100 * (files - torchs):+.2f})"
        )
    return card


def _narrow(
    backbone: torch.nn.Module, plain: Path, made: Path, size: int, options: _OnnxOptions
) -> tuple[list[quantise.LayerCosine], onnx_export.Parity]:
    """Writes the float16 or int8 file and compares it with torch: on random images, or for static int8 on images not used for its scales."""
    batches = (options.batch,) if options.batch else (1, 7, 32)
    if options.calibration is None:
        (onnx_export.to_float16 if options.precision == "float16" else onnx_export.to_int8)(plain, made)
        return [], onnx_export.compare(backbone, made, image_size=size, batches=batches)
    images = quantise.calibration_images(options.calibration, size)
    batch = options.batch or 1
    held = max(len(images) // 8, batch)
    if len(images) - held < batch:
        raise UserError(
            f"{options.calibration} gives {len(images)} images, too few for --batch {batch}: "
            f"{2 * batch} are needed, some to find scales and some to check them"
        )
    layers = quantise.to_static_int8(plain, made, images[held:])
    kept = torch.from_numpy(images[:held])
    return layers, onnx_export.compare(backbone, made, batches=(batch,), images=kept)
