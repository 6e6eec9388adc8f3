#!/bin/bash
#SBATCH --job-name=recipe-submit
#SBATCH --ntasks=1
#SBATCH --time=00:10:00
#SBATCH --output=/dev/null
# Any recipe as a chain: sbatch slurm/recipe.sh RECIPE.yaml DS_CONFIG.json [section.key=value ...]
#
#   sbatch slurm/recipe.sh RECIPE DS_CONFIG [...]      or, on a login node: bash slurm/recipe.sh RECIPE DS_CONFIG [...]
#
# This job only submits the chain: one job for each phase, which resumes by itself. After an interruption submit it again.
# Partition, account, GPUs per node, time, paths: slurm/site.env, see site.env.example and README.md.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
# sbatch runs a copy of this file; Slurm's record of the job has the original path
[ -f "$here/common.sh" ] || here=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed 's/.* Command=\([^ ]*\).*/\1/' | xargs dirname)
. "$here/common.sh"

[ $# -ge 2 ] || { echo "usage: sbatch slurm/recipe.sh RECIPE.yaml DS_CONFIG.json [section.key=value ...]" >&2; exit 2; }
chain "$@"
