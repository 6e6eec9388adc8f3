"""Parquet tables with an image and a label column, as the `datasets` library writes them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.datasets.importers.catalogue import Catalogue, CatalogueWriter, natural_key
from lvtrain.errors import UserError

_GROUPS_KEPT = (
    24  # decoded row groups a process holds; a shard is made of whole groups, so that is enough to read each once
)


class Parquet:
    """SRC/*.parquet; the image column holds bytes, or a struct with `bytes`; the label column integers, strings or a ClassLabel."""

    def __init__(self, path: Path, image_column: str, label_column: str) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError("--kind parquet needs pyarrow; install lvtrain[tools]") from None
        self.path, self.image_column, self.label_column = path, image_column, label_column
        self._parquet = parquet
        self._group = functools.lru_cache(maxsize=_GROUPS_KEPT)(self._read_group)

    def scan(self, out: CatalogueWriter) -> None:
        files = (
            [self.path]
            if self.path.is_file()
            else sorted(self.path.rglob("*.parquet"), key=lambda p: natural_key(str(p)))
        )
        if not files:
            raise UserError(f"{self.path} holds no .parquet file; check SRC and --kind")
        for file in files:
            table = self._parquet.ParquetFile(file)
            for column in (self.image_column, self.label_column):
                if column not in table.schema_arrow.names:
                    have = ", ".join(table.schema_arrow.names)
                    raise UserError(
                        f"{file} has no column {column!r} (it has {have}); name it with --image-column or --label-column"
                    )
            out.class_names.update(_class_names(table.schema_arrow.metadata, self.label_column))
            relative = str(file.relative_to(self.path)) if self.path.is_dir() else file.name
            for group in range(table.num_row_groups):
                labels = table.read_row_group(group, columns=[self.label_column]).column(0).to_pylist()
                for row, label in enumerate(labels):
                    if label is None or (isinstance(label, int) and label < 0):
                        raise UserError(
                            f"{file}: row {row} of group {group} has the label {label}; remove it or give it one"
                        )
                    identity = label if isinstance(label, int) else str(label)
                    out.add(identity, f"{relative}-{group}-{row}", container=f"{relative}\t{group}", offset=row)

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        record = catalogue.rows[row]
        value = self._group(catalogue.containers[record["container"]])[int(record["offset"])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise UserError(
                f"{catalogue.name(row)}: column {self.image_column!r} holds {type(data).__name__}, not image bytes"
            )
        return data

    def grains(self, catalogue: Catalogue) -> np.ndarray:
        """Row groups are read whole, so they are what is shuffled (and then the rows inside a shard)."""
        return np.asarray(catalogue.rows["container"])

    def _read_group(self, container: str) -> Any:
        relative, group = container.rsplit("\t", 1)
        file = self.path / relative if self.path.is_dir() else self.path
        return self._parquet.ParquetFile(file).read_row_group(int(group), columns=[self.image_column]).column(0)


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> dict[int, str]:
    """Names of a ClassLabel feature, which `datasets` keeps in the schema's metadata."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return dict(enumerate(feature["names"]))
    except (KeyError, TypeError, ValueError):
        return {}
