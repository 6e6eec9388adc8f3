#!/bin/bash
#SBATCH --job-name=cluster-submit
#SBATCH --ntasks=1
#SBATCH --time=00:10:00
#SBATCH --output=/dev/null
# ViT-B on WebFace4M, joint classification and clustering (arXiv 2312.04029): one node of 8 GPUs; fewer train the same batches.
#
#   sbatch slurm/cluster.sh [section.key=value ...]      or, on a login node: bash slurm/cluster.sh [section.key=value ...]
#
# This job only submits the chain: one job for each phase, which resumes by itself. After an interruption submit it again.
# Partition, account, GPUs per node, time, paths: slurm/site.env, see site.env.example and README.md.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
# sbatch runs a copy of this file; Slurm's record of the job has the original path
[ -f "$here/common.sh" ] || here=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed 's/.* Command=\([^ ]*\).*/\1/' | xargs dirname)
. "$here/common.sh"

export LVTRAIN_NODES=${LVTRAIN_NODES:-1}
chain lvtrain/recipes/cluster_vitb_webface4m.yaml ds_configs/zero1.json "$@"
