"""A study as one Slurm array job, one task per cell."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from lvtrain.errors import EXIT_STOPPED, UserError
from lvtrain.launch.script import quoted
from lvtrain.launch.site import read_site
from lvtrain.launch.slurm import Slurm
from tools.studies.grid import ROOT, Grid


def array_script(grid: Grid, arguments: list[str]) -> str:
    """The batch script of an array with one task per cell. A task that was asked to stop is queued again."""
    site, ranks = read_site(), grid.options.ranks
    settings = [
        f"--job-name={grid.options.study.stem}",
        f"--array=0-{len(grid.cells) - 1}",
        "--nodes=1",
        f"--ntasks-per-node={ranks}",
        *([f"--gpus-per-node={ranks}"] if site.gpus_per_node else []),
        *([f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []),
        *(f"--{name}={value}" for name, value in (("mem", site.memory), ("partition", site.partition)) if value),
        *(f"--{name}={value}" for name, value in (("account", site.account), ("qos", site.qos)) if value),
        f"--time={site.time}",
        f"--signal=USR2@{site.signal_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={(grid.out / 'slurm').absolute()}/cell_%a.log",
        f"--chdir={Path.cwd()}",
        *site.words("sbatch"),
    ]
    words = [word for word in arguments if word not in ("--submit", "--dry-run")]
    cell = shlex.join([sys.executable, str(ROOT / "tools" / "study.py"), *words])
    task = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {quoted(setting)}" for setting in settings),
        *([f"module load {site.modules}"] if site.modules else []),
        *([f". {shlex.quote(site.setup)}"] if site.setup else []),
        "code=0",
        f'{cell} --array "$SLURM_ARRAY_TASK_ID" || code=$?',
        f"if [ $code -eq {EXIT_STOPPED} ]; then exec scontrol requeue {task}; fi",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def submit(grid: Grid, arguments: list[str]) -> None:
    """Submits the array, or only prints its script with `--dry-run`.

    Raises:
        UserError: a setting starts from another one, so cells cannot run at the same time.
    """
    script = array_script(grid, arguments)
    if grid.options.dry_run:
        print(script, end="")
        return
    if any("{out}" in json.dumps(grid.study.settings[setting]) for setting in grid.settings):
        raise UserError(
            "--submit runs cells at the same time, but a setting starts from another one; run it without --submit"
        )
    grid.make_data()
    path = grid.out / "slurm" / "array.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    print(f"{len(grid.cells)} cells as job {Slurm().submit(path)}; --table prints what is finished")
