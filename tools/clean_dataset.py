"""Finds wrong labels, identities under two labels, repeated images and identities of test sets. Writes a subset without them.

The model is a matrix of embeddings (.npy, one row per sample id), or a run, weights or .onnx that `lvtrain.weights.load_model`
opens. No image is copied or deleted. OUT.json is a subset for `data.path`, OUT.report.json lists what was found, and
OUT.png shows examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lvtrain.data.shards import ShardDataset
from lvtrain.data.subset import DROPPED
from lvtrain.datasets import clean, contact_sheet
from lvtrain.datasets.findings import Findings, choose
from lvtrain.datasets.subset import check_target, write_subset
from lvtrain.errors import UserError, one_line_errors
from lvtrain.files import atomic

_SHOWN = 6


def main(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET")],
    out: Annotated[Path, typer.Argument(metavar="OUT.json", help="subset manifest to write")],
    embeddings: Annotated[Path, typer.Option(help=".npy of all samples, or a model: run, weights or .onnx")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="verification set (.bin) whose identities must not be trained on")
    ] = None,
    evaluation_embeddings: Annotated[
        list[Path] | None, typer.Option(help=".npy of its images, one for each --evaluation")
    ] = None,
    outlier: Annotated[
        float | None,
        typer.Option(
            help="an image with a lower cosine to its identity is an outlier; default: found from the data, and only images that are closer to another identity"
        ),
    ] = None,
    same_person: Annotated[
        float | None,
        typer.Option(
            help="two identities whose centres have a higher cosine are one identity; default: found from the data"
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(
            help="an identity with a higher cosine to an image of a test set is also in the test set; default: found from the data"
        ),
    ] = None,
    merges: Annotated[
        str, typer.Option(help="what to do with an identity under several labels: merge, drop or keep")
    ] = "merge",
    min_images: Annotated[int, typer.Option(help="identities with fewer images left are dropped")] = 1,
    batch: int = 128,
    input_: Annotated[
        str,
        typer.Option(
            "--input", metavar="WORDS", help='how the model takes images, if its file does not say so: "bgr 0..255"'
        ),
    ] = "",
) -> None:
    """Finds faults of DATASET by embeddings and writes OUT.json, a subset without them."""
    with one_line_errors("clean_dataset", out):
        report = _clean(
            dataset, out, embeddings, evaluation or [], evaluation_embeddings or [],
            clean.Limits(outlier=outlier, same_person=same_person, overlap=overlap), merges, min_images, batch, input_,
        )  # fmt: skip
    limits = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in report["limits"].items())
    typer.echo(f"cosines used: {limits}")
    for name, count in report["counts"].items():
        typer.echo(f"  {name.replace('_', ' ')}: {count}")
    typer.echo(
        f"{out}: {report['samples_kept']} of {report['samples']} samples, {report['identities_kept']} of {report['identities']} identities"
    )


def _clean(
    folder: Path,
    out: Path,
    model: Path,
    bins: list[Path],
    bin_embeddings: list[Path],
    limits: clean.Limits,
    merges: str,
    min_images: int,
    batch: int,
    takes: str,
) -> dict[str, Any]:
    if merges not in ("merge", "drop", "keep"):
        raise UserError(f"--merges {merges} is unknown; choose merge, drop or keep")
    if model.suffix == ".npy" and len(bins) != len(bin_embeddings):
        raise UserError(
            f"{len(bins)} --evaluation and {len(bin_embeddings)} --evaluation-embeddings; give one .npy for each .bin, or a model"
        )
    from lvtrain.evaluation.embeddings import check_same_space, read_embeddings  # imports torch
    from lvtrain.evaluation.spread import warning_of

    check_target(out)
    data = ShardDataset(folder)
    read = _reader(data)
    labels = data.labels(np.arange(len(data)))
    embed = None if model.suffix == ".npy" else _model(model, batch, takes)
    given = [read_embeddings(path) for path in (model, *bin_embeddings)] if embed is None else []
    check_same_space(*given)
    vectors = given[0].rows if embed is None else embed(_Samples(read, len(data)))
    if warning := warning_of(vectors):
        typer.echo(f"clean_dataset: warning: {warning}", err=True)
    parts = []
    for number, path in enumerate(bins):
        from lvtrain.evaluation.bins import read_bin

        images, _ = read_bin(path, strict=False)
        theirs = given[1 + number].rows if embed is None else embed(images)
        if len(theirs) != len(images):
            raise UserError(f"{path} has {len(images)} images, its embeddings {len(theirs)} rows; embed this set again")
        parts.append(clean.EvaluationSet(path.stem, theirs, images.__getitem__))
    findings = clean.analyse(vectors, labels, read, limits=limits, evaluation=parts)
    ids, label_of = choose(findings, labels, data.num_classes, same_person=merges, min_images=min_images)
    names = data.label_names()
    report = {
        "samples": len(data),
        "samples_kept": len(ids),
        "identities": data.num_classes,
        "identities_kept": len(np.unique(label_of[label_of != DROPPED])),
        "counts": findings.counts(),
        **findings.as_json(names),
    }
    path = out.with_name(out.stem + ".report.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, report)
    _draw(findings, names, labels, read, {part.name: part.read for part in parts}, out.with_suffix(".png"))
    if not len(ids):
        without = choose(
            replace(findings, overlaps=[]), labels, data.num_classes, same_person=merges, min_images=min_images
        )
        raise UserError(f"{out}: no image would be left. {_blame(findings, len(without[0]), min_images)} See {path}")
    criteria = {
        "cleaned_with": model.name,
        "limits": findings.limits,
        "merges": merges,
        "min_images": min_images,
        **findings.counts(),
    }
    write_subset(out, data, ids, label_of=label_of, criteria=criteria)
    return report


def _blame(findings: Findings, left_without_overlap: int, min_images: int) -> str:
    """Why nothing is left, and what to do."""
    if left_without_overlap:
        return (
            f"{findings.counts()['overlapping_identities']} identities overlap with an evaluation set at a cosine of "
            f"{findings.limits['overlap']:.2f}: it holds the same identities, or the model cannot separate them. Raise --overlap, "
            "or leave --evaluation out."
        )
    return (
        f"{len(findings.outliers)} outliers and --min-images {min_images} leave no identity: the embeddings are of another "
        "dataset, or --outlier, --same-person or --min-images is too strict."
    )


def _reader(data: ShardDataset) -> Callable[[int], bytes]:
    return lambda sample: data.read(sample)[0]


class _Samples:
    """The dataset's encoded images by sample id."""

    def __init__(self, read: Callable[[int], bytes], count: int) -> None:
        self._read, self._count = read, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, sample: int) -> bytes:
        return self._read(sample)


def _model(path: Path, batch: int, takes: str) -> Callable[[Any], np.ndarray]:
    """A function that embeds encoded images with a model, on the GPU if there is one."""
    import torch

    from lvtrain.distributed.world import alone
    from lvtrain.weights import load_model
    from lvtrain.weights.extract import Setting

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(path, device=device, takes=takes)
    typer.echo(model.takes.line())
    setting = Setting(alone(), device, batch, model.image_size)
    return lambda images: setting.embed(model.forward, images)


def _draw(
    findings: Findings,
    names: list[str],
    labels: np.ndarray,
    read: Callable[[int], bytes],
    sets: dict[str, Callable[[int], bytes]],
    path: Path,
) -> None:
    """Draws one row for each finding: the image in question, three of its identity, and three of the other one."""

    def some(label: int, without: int = -1) -> list[bytes]:
        return [read(int(sample)) for sample in np.flatnonzero(labels == label)[:4] if sample != without][:3]

    rows: list[tuple[str, list[bytes]]] = []
    for sample, label, cosine, other, _ in findings.outliers[:_SHOWN]:
        rows.append(
            (
                f"outlier {cosine:.2f} in {names[label]}, like {names[other]}",
                [read(sample), *some(label, sample), *some(other)],
            )
        )
    for group, cosine in findings.same_person[:_SHOWN]:
        rows.append(
            (f"one person {cosine:.2f} {names[group[0]]} and {names[group[1]]}", [*some(group[0]), *some(group[1])])
        )
    for first, second, correlation in findings.duplicates[:_SHOWN]:
        rows.append((f"repeated {correlation:.3f} {names[labels[second]]}", [read(first), read(second)]))
    for name, image, label, cosine in findings.overlaps[:_SHOWN]:
        rows.append((f"in {name} {cosine:.2f} {names[label]}", [sets[name](image), *some(label)]))
    for name, image, sample, correlation in findings.repeated_images[:_SHOWN]:
        rows.append((f"image of {name} {correlation:.3f}", [sets[name](image), read(sample)]))
    if rows:
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in findings.counts().items())
        contact_sheet.draw(rows, counts, path)


if __name__ == "__main__":
    typer.run(main)
