"""What arcface_torch's configurations call things, from `arcface_torch.yaml`."""

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
    """What to say to somebody who writes one of arcface_torch's keys in a recipe; None where it is not one."""
    if (entry := table()["keys"].get(key)) is None:
        return None
    if "ours" not in entry:
        return f"lvtrain needs no such key: {entry['how']}"
    return f"lvtrain calls it {entry['ours'].replace('.*.', '.0.')} ({entry['how']})"


def answer_value(dotted: str, value: Any) -> str:
    """What to add where a value names the wrong thing, such as a margin for a method; empty where nothing is known."""
    name = value.get("name") if isinstance(value, dict) else value
    if dotted == "method" and isinstance(name, str) and name.lower() in table()["margins"]:
        return f"; {name} is a margin: method=classification classifier.margin={name.lower()}"
    return ""
