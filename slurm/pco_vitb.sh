#!/bin/bash
#SBATCH --job-name=pco_vitb-submit
#SBATCH --ntasks=1
#SBATCH --time=00:10:00
#SBATCH --output=/dev/null
# ViT-B on Glint360K, PCO's phases: 4 nodes of 8 GPUs; any number of GPUs that divides 64 trains the same batches.
#
#   sbatch slurm/pco_vitb.sh [section.key=value ...]      or, on a login node: bash slurm/pco_vitb.sh [section.key=value ...]
#
# This job only submits the chain: one job for each phase, which resumes by itself. After an interruption submit it again.
# Partition, account, GPUs per node, time, paths: slurm/site.env, see site.env.example and README.md.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
# sbatch runs a copy of this file; Slurm's record of the job has the original path
[ -f "$here/common.sh" ] || here=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed 's/.* Command=\([^ ]*\).*/\1/' | xargs dirname)
. "$here/common.sh"

export LVTRAIN_NODES=${LVTRAIN_NODES:-4}
chain lvtrain/recipes/pco_vitb_glint360k.yaml ds_configs/zero1.json "$@"
