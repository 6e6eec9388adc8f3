#!/usr/bin/env bash
# Installs lvtrain, editable, into .venv with the pinned versions of constraints.txt.
#
#   bash tools/install.sh            everything: training, tools, alignment of photographs, tests
#   bash tools/install.sh --train    what training needs, nothing else
#   bash tools/install.sh --latest   without pins: the newest versions that pyproject.toml allows
#
# PYTHON=python3.12 chooses the interpreter. If nothing changed since the last installation, it returns at once.
set -euo pipefail
cd "$(dirname "$0")/.."

what=".[tools,align,trackers,test]" pins=(--constraint constraints.txt)
for option in "$@"; do
    case $option in
        --train) what="." ;;
        --latest) pins=() ;;
        *) echo "install.sh: unknown option $option (known: --train, --latest)" >&2; exit 2 ;;
    esac
done

stamp=.venv/.installed
wanted=$(cat pyproject.toml constraints.txt | cksum)" $what ${pins[*]:-}"
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "install.sh: lvtrain needs Python 3.11 or newer, $python is $("$python" -V 2>&1); set PYTHON=..." >&2; exit 2; }
if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv ||
        { echo "install.sh: cannot make .venv; on Debian: apt-get install python3-venv" >&2; exit 2; }
fi

# uv installs several times faster than pip; without it, pip does the same
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip --upgrade >/dev/null
    .venv/bin/python -m pip install --quiet uv && uv=.venv/bin/uv
fi
echo "install.sh: installing $what into .venv and compiling it: this takes some minutes without output"
# compiled once here instead of at every start, where python may not write its bytecode (a start imports for 6 s instead of 13)
if [ -z "$uv" ] || ! "$uv" pip install --quiet --compile-bytecode --python .venv/bin/python "${pins[@]}" --editable "$what"; then
    .venv/bin/python -m pip install --quiet "${pins[@]}" --editable "$what"
fi
echo "$wanted" >"$stamp"
