# Sourced by the scripts in this folder, with $here set to it: reads the site's settings and submits the chain.
# The logic is Python: lvtrain/launch.
# as a job: one log here, rather than in whatever folder sbatch was called from
if [ -n "${SLURM_JOB_ID:-}" ] && [ "$(readlink "/proc/$$/fd/1")" = /dev/null ]; then
    mkdir -p "$here/logs"
    exec >"$here/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.log" 2>&1
fi
cd "$here/.."

# a variable that is set already wins over the site's file, if that is written like site.env.example
export LVTRAIN_SITE=${LVTRAIN_SITE:-slurm/site.env}
set -a
# shellcheck source=/dev/null
[ ! -f "$LVTRAIN_SITE" ] || . "$LVTRAIN_SITE"
set +a

chain() { # RECIPE DS_CONFIG [section.key=value ...]
    local recipe=$1 ds_config=$2
    shift 2
    local python=${LVTRAIN_LAUNCH_PYTHON:-.venv/bin/python}
    command -v "$python" >/dev/null || {
        echo "lvtrain: $python does not exist in $PWD; install lvtrain first: bash tools/install.sh" >&2
        exit 2
    }
    exec "$python" -m lvtrain.launch submit --recipe "$recipe" --ds_config "$ds_config" "$@"
}
