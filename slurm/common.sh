# Sourced by the scripts in this folder, with $here set to it: reads the site's settings and submits the chain.
# The logic is Python: lvtrain/launch.
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
    exec "${LVTRAIN_LAUNCH_PYTHON:-.venv/bin/python}" -m lvtrain.launch submit --recipe "$recipe" --ds_config "$ds_config" "$@"
}
