"""The names of arcface_torch's configurations and ours, from `arcface_torch.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lvtrain.files import markdown

PAGE = Path(__file__).parents[1] / "recipes" / "MOVING_FROM_ARCFACE_TORCH.md"
_BEGIN, _END = "<!-- written by tools/recipe_reference.py -->", "<!-- end -->"


@cache
def table() -> dict[str, Any]:
    """`keys`, `words`, `networks` and what belongs to them, as the file says."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    return found


def network(name: str) -> str:
    """Our name of a network."""
    return str(table()["networks"].get(name, name))


def answer(key: str) -> str | None:
    """The answer to a key of arcface_torch, or to one of `words`, in a recipe; None if it is neither."""
    if (entry := table()["keys"].get(key) or table()["words"].get(key)) is None:
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


def page() -> str:
    """`PAGE`, with the tables of keys and networks between its two marks as the file says."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{_tables()}\n\n{_END}{rest.partition(_END)[2]}"


def _tables() -> str:
    keys = [
        [f"`{key}`", f"`{entry['ours']}`" if "ours" in entry else "not needed", entry["how"], _default(entry)]
        for key, entry in table()["keys"].items()
    ]
    networks = [
        [f"`{theirs}`", f"`{ours}`", str(table()["network_overrides"].get(theirs, "")).replace("'", "").strip("{}")]
        for theirs, ours in table()["networks"].items()
    ]
    return "\n\n".join(
        [
            markdown.table(
                [["arcface_torch", "lvtrain", "how to convert the value", "arcface_torch's default"], *keys]
            ),
            markdown.table([["`config.network`", "`backbone.name`", "`backbone.overrides`"], *networks]),
        ]
    )


def _default(entry: dict[str, Any]) -> str:
    return f"`{entry['default']}`" if "default" in entry else ""
