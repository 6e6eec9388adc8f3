"""Slurm chains from the command line.

`python -m lvtrain.launch submit ...` is called by slurm/*.sh, and `... attempt RUN PHASE` by the jobs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lvtrain.errors import EXIT_ERROR, UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m lvtrain.launch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser("submit", help="submit the chain of a recipe, or what is left of it")
    submit.add_argument("--recipe", required=True)
    submit.add_argument("--ds_config", required=True)
    submit.add_argument("--home", type=Path, default=Path.cwd(), help="the checkout that the jobs run in")
    submit.add_argument("--main", default="lvtrain/main.py", help="the program that each task runs")
    submit.add_argument("--check", action="store_true", help="check everything, submit nothing")
    submit.add_argument("overrides", nargs="*", help="section.key=value")
    attempt = commands.add_parser("attempt", help="try a phase once; called by the jobs")
    attempt.add_argument("run_folder", type=Path)
    attempt.add_argument("phase")
    given = parser.parse_args(arguments)
    try:
        if given.command == "attempt":
            from lvtrain.launch.attempt import Attempt

            return Attempt(given.run_folder, given.phase).run()
        return _submit(given)
    except UserError as error:
        print(f"lvtrain: {error}", file=sys.stderr)
        return EXIT_ERROR


def _submit(given: argparse.Namespace) -> int:
    # here, not at the top: an attempt runs where pydantic need not be installed
    from lvtrain.launch.site import read_site
    from lvtrain.launch.slurm import Slurm
    from lvtrain.launch.submit import plan_chain, submit_chain

    home = given.home.absolute()
    words = (given.recipe, given.ds_config, given.overrides, read_site())
    if given.check:
        chain = plan_chain(*words, home=home, slurm=Slurm(), main=given.main)
        size = f"{chain.site.nodes} nodes x {chain.site.tasks} tasks"
        print(f"checked {chain.run_folder}: {size}, phases {', '.join(chain.phases)}")
        return 0
    chain, jobs = submit_chain(*words, home=home, slurm=Slurm(), main=given.main)
    if jobs:
        numbers = " ".join(map(str, jobs))
        print(f"submitted {chain.run_folder} from phase {chain.first_open_phase()} as {chain.job_name}: {numbers}")
        print(f"where it stands: python tools/slurm_status.py {chain.run_folder}")
        print(f"stop it all:     scancel --name={chain.job_name}")
    else:
        print(f"nothing to do: all phases of {chain.run_folder} are done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
