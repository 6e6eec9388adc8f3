"""What a phase leaves behind: nothing of its weights is in memory when the next phase is built."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.runs import recipe_file


def _left_of_earlier_phases(rank: int, size: int, recipe: str, zero: int) -> tuple[int, list[int]]:
    """The exit code, and for each phase how many tensors of earlier phases are alive when it is built."""
    from lvtrain.main import main
    from lvtrain.training.phase_state import PhaseState

    earlier: list[weakref.ref[Any]] = []
    alive = []
    build = PhaseState.__init__

    def counted(self: PhaseState, *arguments: Any, **more: Any) -> None:
        alive.append(sum(reference() is not None for reference in earlier))
        build(self, *arguments, **more)
        tensors = [*self.method.module.parameters(), self.method.classifier.weight]  # type: ignore[attr-defined]
        earlier.extend(weakref.ref(tensor) for tensor in tensors)

    PhaseState.__init__ = counted  # type: ignore[method-assign]
    code = main(["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / f"zero{zero}.json")])
    return code, alive


def test_a_phase_is_freed_before_the_next_is_built(tiny_faces: Path, tmp_path: Path) -> None:
    for zero in (2, 3):
        recipe = recipe_file(tmp_path / str(zero), tiny_faces / "train", ema={"decay": 0.9})
        (found,) = run_ranks(1, _left_of_earlier_phases, str(recipe), zero)
        assert found == (0, [0, 0, 0]), zero
