#!/usr/bin/env bash
# Tests and measures lvtrain on this machine's GPU, the most important parts first, within the given minutes. Writes tools/results/gpu/.
#   bash tools/gpu_proof.sh [--minutes 10] [--only PART,...] [--out FOLDER] [--small]
# It installs nothing and needs no network. If packages are missing, the parts that need them are listed, and the others run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
exec "$python" -m tools.proof "$@"
