#!/usr/bin/env bash
# Packs this checkout as it is now: bash scripts/pack.sh FILE.tar.gz
# With what is changed and what is new, without what git ignores or what was removed.
set -euo pipefail
cd "$(dirname "$0")/.."
git ls-files -z --cached --others --exclude-standard --deduplicate |
    while IFS= read -r -d '' file; do if [ -e "$file" ]; then printf '%s\0' "$file"; fi; done |
    tar -czf "$1" --null -T -
