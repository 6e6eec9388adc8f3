"""Reads YAML and JSON strictly: no key is written twice, and a small file cannot expand to gigabytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lvtrain.files import reading

LARGEST_FILE = 1 << 20  # bytes
MOST_VALUES = 100_000
DEEPEST = 50


class StrictError(Exception):
    """What is wrong, in one line without the file's name."""


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise StrictError(f"its values are nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first and key.value != "<<":
                raise StrictError(f"key {key.value!r} is in line {first[key.value]} and in line {line}; remove one")
            first[key.value] = line
        return node


def parse_yaml(text: str) -> Any:
    """The values of a YAML document.

    Raises:
        StrictError: it is not YAML, a key is written twice, its values are nested deeply, or its anchors expand to very many.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > MOST_VALUES:
            raise StrictError(f"its anchors (&) and aliases (*) expand to more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise StrictError(f"it is not valid YAML: {' '.join(str(error).split())}") from error


def parse_json(text: str) -> Any:
    """The values of a JSON document.

    Raises:
        StrictError: it is not JSON, a key is written twice, or see `reading.parse_json`.
    """
    try:
        return reading.parse_json(text, object_pairs_hook=_each_key_once, parse_constant=_refuse_constant)
    except ValueError as error:
        raise StrictError(f"it is not JSON: {error}") from error


def read_small(path: Path) -> str:
    """The text of a small file.

    Raises:
        StrictError: it is large, or not UTF-8.
    """
    if path.stat().st_size > LARGEST_FILE:
        raise StrictError(f"it has {path.stat().st_size:,} bytes, more than {LARGEST_FILE:,}")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise StrictError(f"not UTF-8 text: {error}") from error


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in the document after every alias is replaced by its anchor's content."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # an alias of a node inside itself never ends
        pairs = isinstance(node, yaml.MappingNode)
        below = [child for pair in node.value for child in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_expanded(child, known) for child in below)
    return known[id(node)]


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise StrictError(f"key {key!r} is twice in one object; remove one")
        values[key] = value
    return values


def _refuse_constant(name: str) -> float:
    raise StrictError(f"{name} is not a number of JSON")
