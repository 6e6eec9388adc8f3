"""Parquet tables with an image and a label column, as the `datasets` library writes them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from lvtrain.data.images import MAX_BYTES
from lvtrain.datasets.catalogue import Catalogue, CatalogueWriter
from lvtrain.datasets.containers import Containers
from lvtrain.datasets.importer import IMPORTERS, Importer, Options
from lvtrain.datasets.labels import Label, LabelReader
from lvtrain.errors import UserError
from lvtrain.files.checked import check_length, reading
from lvtrain.files.reading import parse_json

_KEPT = 24  # row groups that a process caches; a shard consists of whole groups, so each is read once
_KEPT_BYTES = 1 << 30  # of the cache, besides the group in use
_GROUP_BYTES = 1 << 32  # of the images of one row group


class ParquetOptions(Options):
    """Options of `--kind parquet`."""

    image_column: str = Field("image", description="column with encoded images, or structs with `bytes`")
    label_column: str = Field("label", description="column with numbers, names or a ClassLabel")
    encoding: str = Field("utf-8", description="of labels that are bytes")


@IMPORTERS.register("parquet")
class Parquet(Importer):
    """SRC/*.parquet. If the files number their ClassLabel names differently, identities are joined by name."""

    options_class = ParquetOptions

    def __init__(self, path: Path, options: ParquetOptions) -> None:
        super().__init__(path, options)
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError("--kind parquet needs pyarrow; install lvtrain[tools]") from None
        self._parquet, self._is_integer = parquet, pyarrow.types.is_integer
        self.tables = Containers(path, ".parquet")
        self._groups: OrderedDict[str, Any] = OrderedDict()

    def scan(self, out: CatalogueWriter) -> None:
        files = self.tables.files(out)
        classes = {file: self._class_names(file) for file in files}
        named = list(classes.values())
        by_name = any(names != named[0] for names in named)
        if by_name and not all(named):
            without = next(file for file, names in classes.items() if not names)
            raise UserError(f"{without} has no ClassLabel names and other files have; write all with or without them")
        if not by_name:
            out.class_names.update(named[0])
        for names in named:
            for number, name in names.items():
                out.identity(name if by_name else number)
        reader = LabelReader(self.options.encoding)
        for file in files:
            self._scan_file(file, classes[file], by_name, reader, out)

    def _class_names(self, file: Path) -> dict[int, str]:
        """Names of the ClassLabel, which `datasets` stores in the schema's metadata; empty if there is none."""
        with reading(file, "a Parquet file"):
            schema = self._parquet.read_schema(file)
        for option, column in (
            ("image_column", self.options.image_column),
            ("label_column", self.options.label_column),
        ):
            if column not in schema.names:
                have = ", ".join(schema.names)
                raise UserError(f"{file} has no column {column!r} (it has {have}); name it with --option {option}=NAME")
            if schema.names.count(column) > 1:
                raise UserError(f"{file} has {schema.names.count(column)} columns {column!r}; write it with one")
        try:
            features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = [str(name) for name in features[self.options.label_column]["names"]]
            if not self._is_integer(schema.field(self.options.label_column).type):
                return {}
        except (KeyError, TypeError, ValueError):
            return {}
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{file}: the ClassLabel names hold {twice!r} twice; give each class another name")
        return dict(enumerate(names))

    def _scan_file(
        self, file: Path, names: dict[int, str], by_name: bool, reader: LabelReader, out: CatalogueWriter
    ) -> None:
        relative, before = self.tables.relative(file), out.found
        with reading(file, "a Parquet file"):
            table = self._parquet.ParquetFile(file, page_checksum_verification=True)
            for group in range(table.num_row_groups):
                labels = table.read_row_group(group, columns=[self.options.label_column]).column(0).to_pylist()
                for row, value in enumerate(labels):
                    name, where = f"{relative}-{group}-{row}", f"{file}: row {row} of group {group}"
                    label = reader.of_value(value, where, digits=False)
                    if label is None:
                        out.unlabelled(name)
                        continue
                    identity = _named(label, names, by_name, where)
                    out.add(identity, name, container=f"{relative}\t{group}", offset=row)
            out.announced(str(file), table.metadata.num_rows, out.found - before)

    def read(self, catalogue: Catalogue, row: int) -> bytes:
        record = catalogue.rows[row]
        value = self._group(catalogue.containers[record["container"]])[int(record["offset"])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise UserError(
                f"{catalogue.name(row)}: column {self.options.image_column!r} holds {type(data).__name__}, not image bytes"
            )
        check_length(len(data), MAX_BYTES, catalogue.name(row))
        return data

    def read_groups(self, catalogue: Catalogue) -> np.ndarray:
        """Row groups: they are read whole. So the groups are shuffled, and then the rows inside each shard."""
        return np.asarray(catalogue.rows["container"])

    def _group(self, container: str) -> Any:
        if container in self._groups:
            self._groups.move_to_end(container)
            return self._groups[container]
        relative, group = container.rsplit("\t", 1)
        file = self.tables.absolute(relative)
        with reading(file, "a Parquet file"):
            table = self._parquet.ParquetFile(file, page_checksum_verification=True)
            facts = table.metadata.row_group(int(group))
            size = sum(
                facts.column(at).total_uncompressed_size
                for at in range(facts.num_columns)
                if facts.column(at).path_in_schema.split(".")[0] == self.options.image_column
            )
            check_length(size, _GROUP_BYTES, f"{file}: row group {group}")
            column = table.read_row_group(int(group), columns=[self.options.image_column]).column(0)
        self._groups[container] = column
        while len(self._groups) > 1 and (
            len(self._groups) > _KEPT or sum(kept.nbytes for kept in self._groups.values()) > _KEPT_BYTES
        ):
            self._groups.popitem(last=False)
        return column


def _named(label: Label, names: dict[int, str], by_name: bool, where: str) -> Label:
    """The identity of a label; its class name if the files number the classes differently."""
    if names and isinstance(label, int) and label not in names:
        raise UserError(
            f"{where} has the label {label}, but the ClassLabel has only {len(names)} names; write the file again"
        )
    return names[label] if by_name and isinstance(label, int) else label
