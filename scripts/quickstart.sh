#!/usr/bin/env bash
# Installs ftjax into .venv and fine-tunes SmolLM2-135M-Instruct on a real task, on any CPU, in under ten minutes.
# Further arguments go to ftjax.train: bash scripts/quickstart.sh --workdir /tmp/run --config.seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
# Large pages for a step's large buffers, where Linux and glibc have them: 5 to 15 % less time (docs/performance.md).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec .venv/bin/python -m ftjax.train --config configs/quickstart.py "$@"
