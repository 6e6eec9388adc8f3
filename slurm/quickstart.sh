#!/bin/bash
#SBATCH --job-name=quickstart-submit
#SBATCH --ntasks=1
#SBATCH --time=00:10:00
#SBATCH --output=/dev/null
# The quick start as a chain: generated identities, 2 nodes x 1 task, no GPU needed.
#
#   sbatch slurm/quickstart.sh [section.key=value ...]      or, on a login node: bash slurm/quickstart.sh [section.key=value ...]
#
# This job only submits the chain: one job for each phase, which resumes by itself. After an interruption submit it again.
# Partition, account, GPUs per node, time, paths: slurm/site.env, see site.env.example and README.md.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
# sbatch runs a copy of this file; Slurm's record of the job has the original path
[ -f "$here/common.sh" ] || here=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed 's/.* Command=\([^ ]*\).*/\1/' | xargs dirname)
# before the site's settings, which are meant for larger runs
export LVTRAIN_NODES=${LVTRAIN_NODES:-2} LVTRAIN_GPUS_PER_NODE=${LVTRAIN_GPUS_PER_NODE:-0} LVTRAIN_TIME=${LVTRAIN_TIME:-00:30:00}
. "$here/common.sh"

# nothing is made for a chain that would be refused
(chain lvtrain/recipes/quickstart.yaml ds_configs/zero2.json --check "$@")
[[ " $* " != *" --check "* ]] || exit 0
if [[ " $* " != *" data.path="* ]] && [ ! -f data/quickstart/heldout.bin ]; then
    .venv/bin/python tools/synth_faces.py data/quickstart --identities 500 --images 24 --heldout 60 --pairs 3000 --seed 0
fi
chain lvtrain/recipes/quickstart.yaml ds_configs/zero2.json "$@"
