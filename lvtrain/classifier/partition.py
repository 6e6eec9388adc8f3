"""Which rank holds which classes."""

from __future__ import annotations


def class_range(num_classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """The half-open range of global class ids rank `rank` of `ranks` holds: `[C*r//R, C*(r+1)//R)`.

    Ranges differ by at most one class, follow each other and cover `[0, num_classes)`; with more ranks than classes some are empty.
    """
    return num_classes * rank // ranks, num_classes * (rank + 1) // ranks
