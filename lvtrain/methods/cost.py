"""What a method needs in a phase, for the planner (`lvtrain.planning`)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cost:
    """The cost of a phase. The default is one backbone that sees each image once.

    Attributes:
        views: forward and backward passes for an image, in images of full size (half the side is a quarter).
        forward_views: further passes without gradient, likewise.
        loaded: images that the loader brings for one, likewise.
        parameters: trained ones besides the backbone's.
        largest: of these, the elements of the largest module.
        copies: names of float32 copies of the trained network, each whole on every rank.
        per_image: further bytes for each image of a micro-batch, by name.
        has_classes: whether there are class centres.
        banks: names of what else is kept for every class, a float32 vector each.
        bank_has_negatives: whether the step also goes over all vectors of a bank, as it does over the class centres.
    """

    views: float = 1.0
    forward_views: float = 0.0
    loaded: float = 1.0
    parameters: int = 0
    largest: int = 0
    copies: tuple[str, ...] = ()
    per_image: dict[str, float] = field(default_factory=dict)
    has_classes: bool = False
    banks: tuple[str, ...] = ()
    bank_has_negatives: bool = False
