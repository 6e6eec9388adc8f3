"""The options of a pack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lvtrain.datasets.catalogue import LABEL_ORDERS
from lvtrain.datasets.importer import check_options
from lvtrain.datasets.packing.policies import Policies
from lvtrain.errors import UserError


@dataclass(frozen=True)
class PackOptions:
    """The options that decide the bytes of the result.

    Attributes:
        kind: of the source.
        seed: of the order.
        shuffle: write the samples in random order, so that shards are not sorted by identity.
        samples_per_shard: images in one tar.
        size: pixels a side that every image must have; None = any.
        quality: of a JPEG that must be encoded (PNG, WebP, fixes, alignment). Other JPEGs are copied.
        label_order: how identity names are numbered: `natural` (id2 before id10, as CVLface) or `lexicographic` (as
            torchvision's ImageFolder).
        align: detect faces and align them.
        licence: of the images, for the manifest.
        policies: what is done about each kind of problem.
        detector: with `align`, the ONNX file of OpenCV's YuNet; None: MTCNN of the `align` extra.
        options: of the kind of source, by name; see the classes of `lvtrain/datasets/importers/`.

    Raises:
        UserError: an unknown name, or a value out of range.
    """

    kind: str
    seed: int = 0
    shuffle: bool = True
    samples_per_shard: int = 8192
    size: int | None = 112
    quality: int = 95
    label_order: str = "natural"
    align: bool = False
    detector: str | None = None
    licence: str = "unknown"
    policies: Policies = field(default_factory=Policies)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", check_options(self.kind, self.options).model_dump())
        if self.label_order not in LABEL_ORDERS:
            raise UserError(f"--label-order {self.label_order!r} is unknown; choose one of {', '.join(LABEL_ORDERS)}")
        if (
            self.samples_per_shard < 1
            or not 1 <= self.quality <= 100
            or (self.size is not None and not 16 <= self.size <= 4096)
        ):
            raise UserError("--samples-per-shard must be at least 1, --quality 1 to 100, --size 16 to 4096")
