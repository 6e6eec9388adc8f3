"""Which images of a source are written, under which label and in which order, and what was wrong with the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from lvtrain import randomness
from lvtrain.datasets.catalogue import Catalogue
from lvtrain.datasets.packing import images
from lvtrain.datasets.packing.options import PackOptions
from lvtrain.datasets.packing.policies import Issues
from lvtrain.errors import UserError

_LARGEST_KEPT = 1 << 26  # labels; each costs a line of labels.txt and a class centre


@dataclass(frozen=True)
class Plan:
    """What is written.

    Attributes:
        order: int64 [kept], catalogue rows in the order of writing.
        bounds: where shards begin and end in `order`.
        labels: uint32, by catalogue identity.
        label_map: names by label.
        issues: what was found.
    """

    order: np.ndarray
    bounds: np.ndarray
    labels: np.ndarray
    label_map: list[str]
    issues: Issues


def decide(catalogue: Catalogue, inspection: np.ndarray, groups: np.ndarray | None, options: PackOptions) -> Plan:
    """The plan of a pack.

    Args:
        catalogue: the images of the source.
        inspection: what was found of each, one row an image.
        groups: int, the part of the source that each image is read from; None where the order of reading is free.
        options: of the pack.

    Raises:
        UserError: a problem whose policy is `fail`, no image is left, or two identities would have one name.
    """
    issues = Issues(options.policies)
    for kind, tally in (("mismatch", catalogue.ledger.mismatches), ("unlabelled", catalogue.ledger.unlabelled)):
        issues.add(kind, tally.count, tally.names)
    flags = np.asarray(inspection["flags"])
    keep = np.ones(len(flags), dtype=bool)
    resized = (flags & images.WRONG_SIZE > 0) & (issues.policy("wrong_size") == "fix")
    for kind, has in (
        ("undecodable", flags & images.UNDECODABLE > 0),
        ("no_face", flags & images.NO_FACE > 0),
        ("not_square", resized & (inspection["width"] != inspection["height"])),
        ("wrong_size", flags & images.WRONG_SIZE > 0),
        ("grey", flags & images.GREY > 0),
    ):
        found = np.flatnonzero(has & keep)
        _note(issues, kind, found, catalogue, inspection)
        if issues.policy(kind) == "skip":
            keep[found] = False
    candidates = np.flatnonzero(keep & (flags & images.UNDECODABLE == 0))
    first_of = np.unique(inspection["hash"][candidates], return_index=True)[1]
    repeated = np.delete(candidates, first_of)
    _note(issues, "duplicate", repeated, catalogue, inspection)
    if issues.policy("duplicate") == "skip":
        keep[repeated] = False
    labels, label_map = _labels(catalogue, keep, issues)
    kept = np.flatnonzero(keep)
    if not len(kept):
        raise UserError("every image would be skipped; check the policies and the source")
    order, bounds = _order(kept, groups, options)
    return Plan(order, bounds, labels, label_map, issues)


def _note(issues: Issues, kind: str, rows: np.ndarray, catalogue: Catalogue, inspection: np.ndarray) -> None:
    def name(row: int) -> str:
        size = (
            f" ({inspection[row]['width']}x{inspection[row]['height']})" if kind in ("wrong_size", "not_square") else ""
        )
        return _line(catalogue.name(row)) + size

    issues.add(kind, len(rows), [name(row) for row in rows[: Issues.LISTED].tolist()])


def _labels(catalogue: Catalogue, keep: np.ndarray, issues: Issues) -> tuple[np.ndarray, list[str]]:
    """Final label of each catalogue identity, and the names by final label."""
    identities = catalogue.identities
    images_left = np.bincount(catalogue.rows["identity"][keep], minlength=len(identities))
    names = [_line(catalogue.class_names.get(i, str(i)) if isinstance(i, int) else i) for i in identities]
    if catalogue.numeric:
        numbers = np.array([int(i) for i in identities], dtype=np.int64)
        gaps = int(numbers.max()) + 1 - len(numbers)
        if gaps:
            present = set(numbers.tolist())
            examples = (str(n) for n in range(int(numbers.max())) if n not in present)
            issues.add("label_gap", gaps, [next(examples) for _ in range(min(gaps, 100))])
    numbers_stay = catalogue.numeric and issues.policy("label_gap") == "keep"
    if numbers_stay:  # the source's numbers stay, so an identity without images cannot be dropped
        if int(numbers.max()) >= _LARGEST_KEPT:
            raise UserError(
                f"--label-gap keep would make {int(numbers.max()) + 1:,} classes for {len(numbers):,} identities; choose fix"
            )
        issues.overrule("empty_identity", "keep")
    empty = np.flatnonzero(images_left == 0)
    issues.add("empty_identity", len(empty), [names[i] for i in empty[: Issues.LISTED].tolist()])
    if numbers_stay:
        label_map = [catalogue.class_names.get(n, str(n)) for n in range(int(numbers.max()) + 1)]
        return numbers.astype(np.uint32), _distinct([_line(name) for name in label_map])
    stays = images_left > 0 if issues.policy("empty_identity") == "skip" else np.ones(len(identities), dtype=bool)
    labels = (np.cumsum(stays) - 1).clip(0).astype(np.uint32)
    return labels, _distinct([name for name, stay in zip(names, stays) if stay])


def _distinct(names: list[str]) -> list[str]:
    """The names, if they differ.

    Raises:
        UserError: two identities would have one name in labels.txt, so a choice by name would be ambiguous.
    """
    if len(set(names)) < len(names):
        twice, count = Counter(names).most_common(1)[0]
        raise UserError(f"{count} identities would be written as {twice!r}; rename them in the source")
    return names


def _line(name: str) -> str:
    """A name as one line of text, even if it is not UTF-8."""
    return name.replace("\n", " ").encode(errors="surrogateescape").decode(errors="backslashreplace")


def _order(kept: np.ndarray, groups: np.ndarray | None, options: PackOptions) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of writing, and the bounds of the shards.

    If the source is read in groups, the groups are shuffled first, and then the rows inside each shard.
    """
    size = options.samples_per_shard
    if groups is None or not options.shuffle:
        bounds = np.append(np.arange(0, len(kept), size), len(kept))
        if options.shuffle:
            kept = kept[np.argsort(randomness.bits(options.seed, "pack/order", kept), kind="stable")]
        return kept, bounds
    run = groups[kept].astype(np.int64)
    kept = kept[np.lexsort((kept, run, randomness.bits(options.seed, "pack/run", run)))]
    run = groups[kept]
    edges = np.flatnonzero(np.append(True, run[1:] != run[:-1]))
    starts = [0]
    for edge in edges.tolist():
        if edge - starts[-1] >= size:
            starts.append(edge)
    bounds = np.array([*starts, len(kept)])
    shard = np.searchsorted(bounds, np.arange(len(kept)), side="right")
    return kept[np.lexsort((randomness.bits(options.seed, "pack/order", kept), shard))], bounds
