#!/usr/bin/env bash
# Completes .venv with the test extra and runs ruff and the tests: bash scripts/test.sh [--all] [pytest arguments]
# --all also runs the tests that take minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh test
.venv/bin/ruff check .
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "slow or not slow" "$@"
fi
# Files side by side, in the order of tests/conftest.py: most of the time is compilation, which uses one core. One more
# than there are cores, since some tests wait for processes that they have started.
exec .venv/bin/python -m pytest -n "$(($(nproc) + 1))" --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
