"""The text of a phase's sbatch script."""

from __future__ import annotations

import shlex

from lvtrain.launch.chain import Chain


def sbatch_text(chain: Chain, phase: str) -> str:
    """The batch script of one phase. It runs `python -m lvtrain.launch attempt`, which makes all decisions."""
    site = chain.site
    options = [
        f"--job-name={chain.job_name}",
        f"--comment=phase {phase} of {chain.run_folder}",
        f"--nodes={site.nodes}",
        f"--ntasks-per-node={site.tasks}",
        *([f"--gpus-per-node={site.gpus_per_node}"] if site.gpus_per_node else []),
        *([f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []),
        *([f"--mem={site.memory}"] if site.memory else []),
        *([f"--partition={site.partition}"] if site.partition else []),
        *([f"--account={site.account}"] if site.account else []),
        *([f"--qos={site.qos}"] if site.qos else []),
        f"--time={site.time}",
        f"--signal=USR2@{site.signal_seconds}",
        # after a singleton link dies, the next link starts; a requeued one would run at the same time
        "--no-requeue" if site.links else "--requeue",
        "--kill-on-invalid-dep=yes",
        "--open-mode=append",
        f"--output={chain.folder}/{phase}-%j.log",
        f"--chdir={chain.home}",
        *site.words("sbatch"),
    ]
    attempt = [site.launch_python, "-m", "lvtrain.launch", "attempt", chain.run_folder, phase]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {quoted(option)}" for option in options),
        "# Written by lvtrain.launch at submission. To change it, change slurm/site.env and submit again.",
        f"if [ -f {shlex.quote(site.site)} ]; then set -a; . {shlex.quote(site.site)}; set +a; fi",
        *([f"module load {site.modules}"] if site.modules else []),
        *([f". {shlex.quote(site.setup)}"] if site.setup else []),
        f"exec {shlex.join(attempt)}",
    ]
    return "\n".join(lines) + "\n"


def quoted(option: str) -> str:
    """An sbatch option with its value quoted if it contains a space."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if " " in value else option
