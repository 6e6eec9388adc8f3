"""The page of a proof: each goal with its figure, and how each part ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.proof.part import Ended


def page(ended: Sequence[Ended], command: str, date: str) -> str:
    """Markdown. `ended`: in the order of the parts, with those that did not run."""
    facts: dict[str, Any] = next((one.result for one in ended if one.part.name == "environment"), {})
    versions = ", ".join(f"{name} {value}" for name, value in facts.get("packages", {}).items() if value)
    lines = [
        f"# What does the CUDA path do on {facts.get('gpu') or 'this machine'}?",
        "",
        f"`{command}`, {date}. Driver {facts.get('driver') or 'unknown'}, CUDA {facts.get('cuda')};",
        f"{versions}.",
        "",
        "| goal | figure | verdict |",
        "|---|---|---|",
    ]
    for one in ended:
        for goal in one.part.goals:
            value = goal.value(one.result)
            verdict = ("met" if goal.is_met(one.result) else "missed") if value is not None else one.state
            lines.append(f"| {goal.text} | {_number(value)} | {verdict} |")
    lines += ["", "| part | question | ended | s | why |", "|---|---|---|---|---|"]
    lines += [
        f"| {one.part.name} | {one.part.question} | {one.state} | {one.seconds:g} | {_cell(one.why or one.result.get('note', ''))} |"
        for one in ended
    ]
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    if value is None:
        return ""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
