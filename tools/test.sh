#!/usr/bin/env bash
# Installs what is missing and runs the tests; arguments go to pytest.
#
#   bash tools/test.sh                    everything that runs on this machine in minutes
#   bash tools/test.sh -m slow            the longer proofs
#   bash tools/test.sh tests/test_launch_sandbox.py -k requeue
#
# The last lines list each skipped test with its reason, and pytest's count.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh

# Up to four ranks share two cores: one thread each is faster, and sums do not depend on the machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# deepspeed and ninja are found by name
export PATH="$PWD/.venv/bin:$PATH"

# The whole suite runs in two processes, a file at a time; chosen tests run in one, where output can be read.
parallel=()
if [ $# = 0 ]; then parallel=(--numprocesses 2 --dist loadfile --no-loadscope-reorder); fi

exec .venv/bin/python -m pytest "${parallel[@]}" "$@"
