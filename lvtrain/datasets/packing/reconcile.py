"""The sum at the end of a pack: announced + unannounced = packed + skipped + refused. It shows that nothing was lost."""

from __future__ import annotations

from typing import Any

from lvtrain.datasets.catalogue import Ledger

_SKIPPED = ("wrong_size", "not_square", "grey", "duplicate", "no_face")  # sound images that a policy leaves out


def reconcile(ledger: Ledger, listed: int, packed: int, issues: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sum, with its parts and as a line of text.

    Args:
        ledger: of the catalogue.
        listed: images of the catalogue.
        packed: images written.
        issues: of the report, by kind, with policy and count.

    Returns:
        A dict:

        - `announced`: images according to the source's header, index or manifest; without one, what was found.
        - `unannounced`: images found beyond that.
        - `packed`: images written.
        - `skipped`: counts by reason; left out by a rule or a policy.
        - `refused`: counts by reason; could not be packed.
        - `line`: the sum as text.

    Raises:
        RuntimeError: the sum is wrong, which is a bug of lvtrain.
    """
    skipped = {reason: tally.count for reason, tally in ledger.left_out.items()}
    skipped |= {kind: issues[kind]["count"] for kind in _SKIPPED if issues[kind]["policy"] == "skip"}
    refused = {
        "undecodable": issues["undecodable"]["count"] if issues["undecodable"]["policy"] == "skip" else 0,
        "unlabelled": ledger.unlabelled.count,
        "announced but not found": ledger.missing,
    }
    skipped, refused = ({reason: count for reason, count in part.items() if count} for part in (skipped, refused))
    found = listed + sum(tally.count for tally in ledger.left_out.values()) + ledger.unlabelled.count
    announced = found + ledger.missing - ledger.unannounced
    if announced + ledger.unannounced != packed + sum(skipped.values()) + sum(refused.values()):
        raise RuntimeError(
            f"{announced} + {ledger.unannounced} announced, {packed} packed, {skipped} skipped, {refused} refused"
        )
    extra = f" + unannounced {ledger.unannounced:,}" if ledger.unannounced else ""
    line = f"announced {announced:,}{extra} = packed {packed:,} + skipped {_sum(skipped)} + refused {_sum(refused)}"
    return {
        "announced": announced,
        "unannounced": ledger.unannounced,
        "packed": packed,
        "skipped": skipped,
        "refused": refused,
        "line": line,
    }


def _sum(parts: dict[str, int]) -> str:
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in parts.items())
    return f"{sum(parts.values()):,}" + (f" ({reasons})" if reasons else "")
