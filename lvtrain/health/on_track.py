"""Follows a run: its first loss, where it stands against the band of its card, and when its phases reach delta.

Everything comes from rows of `metrics.jsonl`, so a resumed run reads the rows of its earlier starts and goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvtrain.files.reading import read_records
from lvtrain.health.curves import Curve, PhaseEnds, Reference
from lvtrain.health.first_loss import FirstLoss, compare

_EARLY = (0.25, 0.5)  # parts of the first epoch after which the run is compared, too
_WINDOW = 0.1  # epochs of which the mean loss is taken then


@dataclass(frozen=True)
class Note:
    """What there is to say: an event of `events.jsonl`, and a line of the log."""

    event: str
    fields: dict[str, Any]
    text: str
    is_warning: bool = False


class OnTrack:
    """One run against what is known of it.

    Args:
        wanted: what the first loss must be, or why that is not known.
        reference: the curve of the run's card; None where it has none.
        folder: of the run, whose `metrics.jsonl` has the rows so far.
    """

    def __init__(self, wanted: FirstLoss | str, reference: Reference | None, folder: Path) -> None:
        self.wanted, self.reference = wanted, reference
        self._curve: Curve | None = reference.curve if reference and len(reference.curve.epochs) else None
        self._rows: list[tuple[int, float, float]] = [
            _brief(row) for row in read_records(folder / "metrics.jsonl", "step", int)[0]
        ]
        self._expected: tuple[str, float, PhaseEnds] | None = None  # of the phase that is trained

    def start(self) -> list[Note]:
        """What to say as training starts."""
        if self.reference is None:
            return []
        differs = {key: list(values) for key, values in self.reference.differs.items()}
        fields = {"card": self.reference.curve.name, "source": self.reference.curve.source, "differs": differs}
        return [Note("reference", fields, self.reference.text)]

    def first_loss(self, found: float) -> list[Note]:
        """Compares the loss of step 1."""
        if isinstance(self.wanted, str):
            return []
        compared = compare(self.wanted, found)
        return [Note("first_loss", compared.fields(), compared.text, not compared.agrees)]

    # ------------------------------------------------------------------------------------------------------------- the curve

    def columns(self, epoch: float) -> dict[str, float]:
        """The band at an epoch, as columns of a row of `metrics.jsonl`."""
        if self._curve is None or epoch > self._curve.last:
            return {}
        low, high = self._curve.band(epoch)
        return {"reference_low": round(low, 4), "reference_high": round(high, 4)}

    def add(self, row: dict[str, Any]) -> list[Note]:
        """Adds a row of `metrics.jsonl`; compares at the end of each epoch, and twice in the first."""
        step, epoch, loss = _brief(row)
        self._rows = [earlier for earlier in self._rows if earlier[0] < step]  # later ones were rolled back
        before = self._rows[-1][1] if self._rows else 0.0
        self._rows.append((step, epoch, loss))
        notes = self._late(before, epoch, row.get("cos2_window"))
        if self._curve is None:
            return notes
        marks = [mark for mark in _EARLY if before < mark <= epoch]
        marks += range(int(before) + 1, int(epoch) + 1)
        return notes + [note for mark in marks if mark <= self._curve.last for note in self._compare(float(mark))]

    def _compare(self, mark: float) -> list[Note]:
        assert self._curve is not None
        start = mark - 1 if mark >= 1 else mark - _WINDOW
        loss = self._mean(start, mark)
        if loss is None:
            return []
        low, high = self._curve.mean_band(start, mark)
        stand = "below" if loss < low else "above" if loss > high else "within"
        card = self._curve.name
        fields: dict[str, Any] = {"epoch": mark, "loss": round(loss, 4), "low": round(low, 4), "high": round(high, 4)}
        fields |= {"stand": stand, "card": card}
        when = f"mean of epoch {mark:g}" if mark >= 1 else f"at epoch {mark:g}"
        other = " (from other settings)" if self.reference and self.reference.differs else ""
        return [
            Note(
                "on_track",
                fields,
                f"loss {loss:.3g} ({when}) is {stand} the band of {card}{other}, {low:.3g} to {high:.3g}",
            )
        ]

    def _mean(self, start: float, stop: float) -> float | None:
        """Mean loss from epoch `start` to `stop`; None where less than half of it was logged."""
        before, total, covered = 0.0, 0.0, 0.0
        for _, epoch, loss in self._rows:
            share = min(epoch, stop) - max(before, start)
            before = epoch
            if share > 0 and loss == loss:
                total, covered = total + share * loss, covered + share
        return total / covered if covered > (stop - start) / 2 else None

    # ------------------------------------------------------------------------------------------------------------ the phases

    def phase_started(self, name: str, delta: float | None) -> list[Note]:
        """Says when the phase is expected to reach its delta, where that is known."""
        ends = self.reference.curve.phase_ends.get(name) if self.reference else None
        self._expected = None
        if ends is None or delta is None or self.reference is None:
            return []
        self._expected = name, delta, ends
        fields = {"phase": name, "delta": delta, "earliest": ends.earliest, "latest": ends.latest}
        source = self.reference.curve.source
        return [
            Note(
                "delta_expected",
                fields,
                f"phase {name} is expected to reach cos2 {delta:g} (its delta) {_range(ends)} ({source})",
            )
        ]

    def phase_ended(self, epoch: float, reason: str) -> list[Note]:
        """Compares the end of a phase."""
        if self._expected is None:
            return []
        name, delta, ends = self._expected
        self._expected = None
        verb = "reached" if reason == "cos2" else "did not reach"
        stand = "earlier" if epoch < ends.earliest else "later" if epoch > ends.latest else "as expected"
        fields = {"phase": name, "delta": delta, "reached": reason == "cos2", "epoch": round(epoch, 3), "stand": stand}
        fields |= {"earliest": ends.earliest, "latest": ends.latest}
        end = f"by epoch {epoch:.3g}" if reason != "cos2" else f"at epoch {epoch:.3g}"
        return [Note("delta", fields, f"phase {name} {verb} cos2 {delta:g} (its delta) {end}; expected {_range(ends)}")]

    def _late(self, before: float, epoch: float, cos2: float | None) -> list[Note]:
        if self._expected is None or not before <= self._expected[2].latest < epoch:
            return []
        name, delta, ends = self._expected
        fields = {"phase": name, "delta": delta, "epoch": epoch, "cos2_window": cos2, "latest": ends.latest}
        now = "" if cos2 is None else f", its mean is {cos2:.3f}"
        return [
            Note(
                "delta_late",
                fields,
                f"phase {name} has not reached cos2 {delta:g} (its delta){now}; expected {_range(ends)}",
            )
        ]


def _range(ends: PhaseEnds) -> str:
    return f"between epochs {ends.earliest:g} and {ends.latest:g}"


def _brief(row: dict[str, Any]) -> tuple[int, float, float]:
    loss = row.get("loss")
    return int(row["step"]), float(row.get("epoch") or 0.0), float("nan") if loss is None else float(loss)
