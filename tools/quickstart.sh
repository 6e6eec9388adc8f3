#!/usr/bin/env bash
# Installs lvtrain into .venv, generates 500 identities, trains PCO's three phases on 2 ranks, evaluates, and writes the report.
#   bash tools/quickstart.sh [section.key=value ...]      e.g. schedule.total="300 steps"
# Each start begins anew: it deletes runs/quickstart, with its checkpoints. The generated faces in data/quickstart are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
for word in "$@"; do
    case $word in
        name=* | runs=* | evaluation.benchmarks*)
            echo "quickstart.sh: cannot change ${word%%=*}, because the script reads runs/quickstart and its benchmark at the end;" \
                "for a run of your own: deepspeed lvtrain/main.py --recipe lvtrain/recipes/quickstart.yaml --ds_config ds_configs/zero2.json $word" >&2
            exit 2 ;;
    esac
done
bash tools/install.sh
export PATH="$PWD/.venv/bin:$PATH"

if [ ! -f data/quickstart/heldout.bin ]; then
    python tools/synth_faces.py data/quickstart --identities 500 --images 24 --heldout 60 --pairs 3000 --seed 0
fi

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi
ranks=2; if [ "$gpus" = 1 ]; then ranks=1; fi

rm -rf runs/quickstart
deepspeed --num_accelerators "$ranks" lvtrain/main.py --recipe lvtrain/recipes/quickstart.yaml --ds_config ds_configs/zero2.json "$@"
python tools/report.py runs/quickstart
python - <<'END'
import json
from lvtrain.evaluation import Setting, raw_pixels, run_benchmarks
from lvtrain.distributed.world import alone

final = json.load(open("runs/quickstart/evaluation/final.json"))["benchmarks"]["heldout"]
pixels = run_benchmarks(raw_pixels, {"heldout": "data/quickstart/heldout.bin"}, Setting(alone(), "cpu"))["heldout"]
print(
    f"quickstart: verification {100 * final['accuracy']:.2f}% on {final['pairs']} pairs of unseen identities "
    f"(raw pixels {100 * pixels['accuracy']:.2f}%), report: runs/quickstart/report.html"
)
END
