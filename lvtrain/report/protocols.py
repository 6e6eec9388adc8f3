"""Results that `tools/evaluate.py` wrote to a run's folder (`RUN/NAME/evaluation.json`): tables and headlines."""

from __future__ import annotations

from lvtrain.evaluation.protocol import PROTOCOLS
from lvtrain.report.files import Row, RunFiles


def tables(run: RunFiles) -> dict[str, list[Row]]:
    """Rows of every protocol that has a table, by the protocol's title."""
    found: dict[str, list[Row]] = {}
    for benchmark, result in _results(run):
        protocol = PROTOCOLS.get(result["kind"])
        if rows := protocol.rows(result):
            found.setdefault(protocol.title, []).extend({"benchmark": benchmark, **row} for row in rows)
    return found


def headlines(run: RunFiles) -> list[Row]:
    """What `tools/evaluate.py` prints of the protocols without their own table."""
    rows: list[Row] = []
    for benchmark, result in _results(run):
        protocol = PROTOCOLS.get(result["kind"])
        if not protocol.has_own_part:
            shown = protocol.headline(result)
            rows += [{"benchmark": benchmark, "protocol": protocol.title, "figure": f, "value": v} for f, v in shown]
    return rows


def _results(run: RunFiles) -> list[tuple[str, Row]]:
    return [
        (f"{name}, {folder}" if len(run.protocols) > 1 else name, result)
        for folder, found in run.protocols.items()
        for name, result in found.items()
        if result.get("kind") in PROTOCOLS.names()
    ]
