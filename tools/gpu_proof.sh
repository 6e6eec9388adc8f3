#!/usr/bin/env bash
# Proves the CUDA path on this machine's GPU, most important first, within the minutes given, and writes tools/results/gpu/.
#   bash tools/gpu_proof.sh [--minutes 10] [--only PART,...] [--out FOLDER] [--small]
# It installs nothing and needs no network. A part whose packages are missing is named, and the others run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
exec "$python" -m tools.proof "$@"
