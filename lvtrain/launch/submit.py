"""Submitting a chain: freeze the plan, write the phases' scripts, and give the first job (or all links) to Slurm."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lvtrain.engine.ds_config import resolve_ds_config
from lvtrain.errors import UserError
from lvtrain.files.atomic import write_bytes, write_text
from lvtrain.launch.attempt import stopped_path, submit_phase
from lvtrain.launch.chain import Chain
from lvtrain.launch.ledger import Ledger
from lvtrain.launch.script import sbatch_text
from lvtrain.launch.site import Site
from lvtrain.launch.slurm import Slurm
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from lvtrain.training import outcome as outcomes


def submit_chain(
    recipe_path: str,
    ds_config: str,
    overrides: Sequence[str],
    site: Site,
    *,
    home: Path,
    slurm: Slurm,
    main: str = "lvtrain/main.py",
    clock: Callable[[], float] = time.time,
) -> tuple[Chain, list[int]]:
    """Submits the phases that are not done. A chain that was stopped, or lost its jobs, resumes from its last checkpoint.

    Returns:
        The chain, and the ids of the submitted jobs (none if every phase is done).

    Raises:
        UserError: what `plan_chain` refuses, or sbatch's refusal.
    """
    chain = plan_chain(recipe_path, ds_config, overrides, site, home=home, slurm=slurm, main=main)
    chain.save()
    _mark_if_finished(chain)
    # copies, because somebody may edit the originals in the weeks that a chain takes
    write_bytes(Path(chain.recipe), Path(_absolute(home, recipe_path)).read_bytes())
    write_bytes(Path(chain.ds_config), Path(_absolute(home, ds_config)).read_bytes())
    for phase in chain.phases:
        write_text(chain.script(phase), sbatch_text(chain, phase))
    stopped_path(chain).unlink(missing_ok=True)
    ledger = Ledger(chain.folder, clock)
    ledger.add("chain", mode=site.chain, nodes=site.nodes, ranks=site.ranks)
    still_open = [phase for phase in chain.phases if not chain.is_done(phase)]
    if not site.links:
        return chain, [submit_phase(chain, ledger, slurm, still_open[0])] if still_open else []
    jobs: list[int] = []
    for phase in still_open:
        for _ in range(site.links):
            jobs.append(submit_phase(chain, ledger, slurm, phase, "--dependency=singleton"))
    return chain, jobs


def _mark_if_finished(chain: Chain) -> None:
    """Marks all phases done if a start outside Slurm has finished the run."""
    folder = Path(chain.run_folder)
    last = outcomes.read(folder)
    if last is None or last.outcome != "done" or last.phase is not None:
        return
    if last.step == outcomes.committed_step(folder):
        for phase in chain.phases:
            chain.mark_done(phase, last)


def plan_chain(
    recipe_path: str,
    ds_config: str,
    overrides: Sequence[str],
    site: Site,
    *,
    home: Path,
    slurm: Slurm,
    main: str = "lvtrain/main.py",
) -> Chain:
    """The chain that would be submitted. Writes nothing.

    Raises:
        UserError: a recipe that is refused, a number of ranks that does not divide a phase's micro-batches, a DeepSpeed
            JSON that is refused, no Slurm here, or a chain that already has jobs in the queue.
    """
    words = [*site.words("overrides"), *overrides]
    recipe = recipes.load(_absolute(home, recipe_path), words)
    _check_ranks(recipe, site)
    resolve_ds_config(  # what training would refuse, hours later
        Path(_absolute(home, ds_config)), optimizer=recipe.optimizer, phases=recipe.phases, world_size=site.ranks
    )
    run_folder = (home / recipe.run_folder).absolute()
    chain = Chain(
        name=recipe.name,
        home=str(home),
        run_folder=str(run_folder),
        phases=tuple(phase.name for phase in recipe.phases),
        recipe=str(run_folder / "slurm" / "recipe.yaml"),
        ds_config=str(run_folder / "slurm" / "ds_config.json"),
        overrides=tuple(words),
        site=replace(site, launch_python=site.launch_python or sys.executable),
        main=main,
    )
    queued = slurm.queue(chain.job_name)
    if queued:
        listed = ", ".join(f"{row.job} {row.state}" for row in queued)
        raise UserError(f"{chain.job_name} already has jobs ({listed}); to start over: scancel --name={chain.job_name}")
    return chain


def _absolute(home: Path, path: str) -> str:
    return str(home / path)


def _check_ranks(recipe: Recipe, site: Site) -> None:
    for phase in recipe.phases:
        v = phase.micro_batches
        if v % site.ranks:
            allowed = ", ".join(str(r) for r in range(1, v + 1) if v % r == 0)
            raise UserError(
                f"{site.nodes} nodes x {site.tasks} tasks = {site.ranks} ranks do not divide micro_batches={v} of phase "
                f"{phase.name}; ranks may be {allowed}: set LVTRAIN_NODES, LVTRAIN_GPUS_PER_NODE"
            )
