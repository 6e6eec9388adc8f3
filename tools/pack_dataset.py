"""Packs a face dataset SRC (image folders, WebFace, RecordIO, Parquet, tars) into WebDataset shards with an index in OUT.

To continue a pack that was killed, give the same command again. JPEGs are copied byte for byte.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lvtrain.datasets.importer import IMPORTERS
from lvtrain.datasets.packing import POLICIES, PackOptions, Policies, pack
from lvtrain.datasets.packing.pack import REPORT, SHEET
from lvtrain.errors import UserError, one_line_errors


def _policy(kind: str) -> Any:
    text, allowed = POLICIES[kind]
    return typer.Option(help=f"{text} ({'|'.join(allowed)})", rich_help_panel="Policies")


def _options_of_kinds() -> str:
    lines = [
        f"{kind}: "
        + ", ".join(f"{name} ({field.description})" for name, field in entry.options_class.model_fields.items())
        for kind, entry in IMPORTERS.entries().items()
        if entry.options_class.model_fields
    ]
    return "; ".join(lines)


def _options(given: list[str]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise UserError(f"--option {text}: write it as NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


def main(
    source: Annotated[Path, typer.Argument(metavar="SRC")],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    kind: Annotated[str, typer.Option(help=" | ".join(IMPORTERS.names()))],
    workers: Annotated[
        int, typer.Option(min=1, max=1024, help="number of processes; the result does not depend on it")
    ] = os.cpu_count() or 1,
    seed: Annotated[int, typer.Option(help="seed of the shuffle")] = 0,
    shuffle: Annotated[
        bool, typer.Option(help="write in random order, so that shards are not sorted by identity")
    ] = True,
    samples_per_shard: int = 8192,
    size: Annotated[int, typer.Option(help="pixels per side; 0 accepts every size")] = 112,
    quality: Annotated[
        int, typer.Option(help="JPEG quality where an image must be encoded: PNG, WebP, fixes, alignment")
    ] = 95,
    label_order: Annotated[str, typer.Option(help="natural (id2 before id10) or lexicographic")] = "natural",
    align: Annotated[bool, typer.Option("--align", help="raw photographs: find the largest face and align it")] = False,
    detector: Annotated[
        str | None, typer.Option(metavar="FILE", help="with --align: OpenCV's YuNet (.onnx) in place of MTCNN")
    ] = None,
    licence: Annotated[str, typer.Option(help="licence of the images; copied into runs and model cards")] = "unknown",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help=f"option of the kind of source; {_options_of_kinds()}"),
    ] = None,
    wrong_size: Annotated[str, _policy("wrong_size")] = "fix",
    not_square: Annotated[str, _policy("not_square")] = "fail",
    undecodable: Annotated[str, _policy("undecodable")] = "skip",
    grey: Annotated[str, _policy("grey")] = "keep",
    empty_identity: Annotated[str, _policy("empty_identity")] = "skip",
    duplicate: Annotated[str, _policy("duplicate")] = "keep",
    label_gap: Annotated[str, _policy("label_gap")] = "fix",
    no_face: Annotated[str, _policy("no_face")] = "skip",
    unlabelled: Annotated[str, _policy("unlabelled")] = "fail",
    mismatch: Annotated[str, _policy("mismatch")] = "fail",
) -> None:
    """Packs SRC into WebDataset shards with an index in OUT. The same command continues a pack that was killed."""
    with one_line_errors("pack_dataset", out):
        options = PackOptions(
            kind=kind, seed=seed, shuffle=shuffle, samples_per_shard=samples_per_shard, size=size or None, quality=quality,
            label_order=label_order, align=align, detector=detector, licence=licence, options=_options(option or []),
            policies=Policies(
                wrong_size=wrong_size, not_square=not_square, undecodable=undecodable, grey=grey,
                empty_identity=empty_identity, duplicate=duplicate, label_gap=label_gap, no_face=no_face, unlabelled=unlabelled, mismatch=mismatch,
            ),
        )  # fmt: skip
        columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            tasks: dict[str, Any] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total or None)
                bar.update(tasks[stage], completed=done)

            report = pack(source, out, options, workers=workers, progress=show)
    _summary(report, out)


def _summary(report: dict[str, Any], out: Path) -> None:
    typer.echo(
        f"{out}: {report['identities']} identities, {report['images_written']} images in {report['shards']} shard(s), {report['bytes'] / 1e6:.1f} MB; "
        f"{report['images_untouched']} copied, {report['images_encoded']} encoded, {report['images_skipped']} skipped"
    )
    for name, issue in report["troubles"].items():
        if issue["count"]:
            typer.echo(f"  {name}: {issue['count']} ({issue['policy']}), first: {issue['list'][0]}")
    typer.echo(f"  {report['reconciliation']['line']}")
    for heading in ("left_out", "ignored"):
        for reason, tally in report[heading].items():
            typer.echo(f"  {heading.replace('_', ' ')}: {tally['count']} x {reason}, first: {tally['names'][0]}")
    typer.echo(f"  {report['contact_sheet']}")
    typer.echo(f"  look at {out / SHEET}; every image with a problem is listed in {out / REPORT}")


if __name__ == "__main__":
    typer.run(main)
