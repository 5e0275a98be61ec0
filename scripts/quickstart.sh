#!/usr/bin/env bash
# Installs ftjax into .venv and fine-tunes SmolLM2-135M-Instruct on a real task, on any CPU, in under ten minutes.
# Further arguments go to ftjax.train: bash scripts/quickstart.sh --workdir /tmp/run --config.seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
exec .venv/bin/python -m ftjax.train --config configs/quickstart.py "$@"
