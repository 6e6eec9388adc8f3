"""What breaks first when GPUs or identities grow, and what helps: the table of `tools/plan.py --scale-table`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from lvtrain.files import markdown
from lvtrain.planning.device import H200, Device
from lvtrain.planning.phases import measure, phase_setup
from lvtrain.planning.plan import Plan, plan
from lvtrain.planning.setup import ClassCentres, Setup
from lvtrain.planning.suggest import ROOM
from lvtrain.recipe.sections import Recipe

RANKS = (8, 64, 256, 512)
IDENTITIES = (2_000_000, 10_000_000, 100_000_000)
_SHORT = {"communication waited for": "communication"}
GOOD = 0.9  # of the images/s of the backbone alone


def _classes(setup: Setup, **changes: object) -> Setup:
    assert setup.classes is not None
    return replace(setup, classes=replace(setup.classes, **changes))  # type: ignore[arg-type]


# what may help, by the short names of the table
REMEDIES: dict[str, Callable[[Setup], Setup]] = {
    "r=0.1": lambda setup: _classes(setup, sample_rate=0.1),
    "row-sparse": lambda setup: _classes(setup, mode="row_sparse"),
    "bf16 moments": lambda setup: _classes(setup, moments_bytes=2),
}


@dataclass(frozen=True)
class Cell:
    """One number of GPUs and of identities: the plan as it is, what breaks, what helps, and the plan then."""

    ranks: int
    identities: int
    before: Plan
    breaks: str
    remedies: tuple[str, ...]
    after: Plan


def scale_cells(recipe: Recipe, *, device: Device = H200) -> Iterator[Cell]:
    """Plans the recipe's phase that needs most time a step, under ZeRO-1, with one micro-batch a GPU and step.

    Its global batch stays as it is, except where it would be cut into more micro-batches on few GPUs.
    """
    network, frozen = measure(recipe)
    for ranks in RANKS:
        for identities in IDENTITIES:
            setups = [
                replace(
                    phase_setup(recipe, phase, network, frozen, num_classes=identities),
                    ranks=ranks,
                    micro_batch=phase.global_batch // max(phase.micro_batches, ranks),
                    accumulation=max(1, phase.micro_batches // ranks),
                    device=device,
                )
                for phase in recipe.phases
                if max(phase.micro_batches, ranks) % ranks == 0 and phase.global_batch % ranks == 0
            ]
            setup = max(setups, key=lambda one: plan(one).step_seconds)
            before = plan(setup)
            remedies = _remedies(setup)
            yield Cell(ranks, identities, before, what_breaks(before), remedies, plan(_with(setup, remedies)))


def what_breaks(found: Plan) -> str:
    """The largest part of the memory where it does not fit, or of the time beside the backbone's; "nothing"."""
    if not found.fits:
        name, size = max(_groups(found).items(), key=lambda item: item[1])
        return f"memory: {name} {size / 1e9:.0f} GB"
    if share(found) >= GOOD:
        return "nothing"
    waited = {name: time for name, time in found.seconds.items() if name not in ("forward", "backward")}
    name, seconds = max(waited.items(), key=lambda item: item[1])
    return f"time: {_SHORT.get(name, name)} {seconds / found.step_seconds:.0%}"


def share(found: Plan) -> float:
    """Images/s against the backbone alone."""
    return (found.seconds["forward"] + found.seconds["backward"]) / found.step_seconds


def _groups(found: Plan) -> dict[str, float]:
    """Memory in words that a reader can act on."""
    banks = found.setup.classes.banks if isinstance(found.setup.classes, ClassCentres) else ()
    groups: dict[str, float] = {}
    for name, size in found.memory.items():
        group = "class centres" if name.startswith("class centres") or name in banks else name
        groups[group] = groups.get(group, 0.0) + size
    return groups


def _with(setup: Setup, remedies: tuple[str, ...]) -> Setup:
    for name in remedies:
        setup = REMEDIES[name](setup)
    return setup


def _remedies(setup: Setup) -> tuple[str, ...]:
    """The fewest that make it fit `ROOM` of the memory with `GOOD` of the backbone's images/s.

    Where none do, the fewest that come within 1% of the best.
    """
    every = [names for count in range(len(REMEDIES) + 1) for names in combinations(REMEDIES, count)]
    plans = {names: plan(_with(setup, names)) for names in every}
    room = ROOM * setup.device.memory
    fitting = [names for names in every if plans[names].total_memory <= room] or every
    good = [names for names in fitting if share(plans[names]) >= GOOD]
    best = max(share(plans[names]) for names in fitting)
    few = good or [names for names in fitting if share(plans[names]) >= best - 0.01]
    return min(few, key=lambda names: (len(names), -share(plans[names])))


def scale_table(recipe: Recipe, *, device: Device = H200) -> str:
    """The cells as a Markdown table."""
    rows = [("GPUs", "identities", "GB", "images/s", "breaks first", "what then", "GB", "images/s")]
    for cell in scale_cells(recipe, device=device):
        figures = [
            (f"{found.total_memory / 1e9:.1f}{'' if found.fits else ' !'}", f"{found.images_per_second:,.0f}")
            for found in (cell.before, cell.after)
        ]
        then = ", ".join(cell.remedies) or "-"
        rows.append((str(cell.ranks), f"{cell.identities / 1e6:.0f} M", *figures[0], cell.breaks, then, *figures[1]))
    return markdown.table(rows)
