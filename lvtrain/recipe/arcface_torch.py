"""The names of arcface_torch's configurations and ours, from `arcface_torch.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def table() -> dict[str, Any]:
    """`keys` and `networks`, as the file says."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    return found


def network(name: str) -> str:
    """Our name of a network."""
    return str(table()["networks"].get(name, name))


def answer(key: str) -> str | None:
    """The answer to a key of arcface_torch in a recipe; None if it is not one."""
    if (entry := table()["keys"].get(key)) is None:
        return None
    if "ours" not in entry:
        return f"lvtrain needs no such key: {entry['how']}"
    return f"lvtrain calls it {entry['ours'].replace('.*.', '.0.')} ({entry['how']})"


def answer_value(dotted: str, value: Any) -> str:
    """A hint for a value that names another kind of thing, such as a margin for a method; empty if there is none."""
    name = value.get("name") if isinstance(value, dict) else value
    if dotted == "method" and isinstance(name, str) and name.lower() in table()["margins"]:
        return f"; {name} is a margin: method=classification classifier.margin={name.lower()}"
    return ""
