#!/usr/bin/env bash
# Looks for known vulnerabilities in every lock file. Run it with `make audit`. OSV is asked, the open list of all
# ecosystems. Exits with 1 if there are any; where OSV cannot be reached, it says so and exits with 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT

status=0
for file in requirements/*.txt; do
  # The version of the CPU build of torch, "+cpu", is in no list; torch.txt has the same version.
  [ "$file" = requirements/torch-cpu.txt ] && continue
  if ${BIN:-.venv/bin}/pip-audit --vulnerability-service osv --disable-pip --require-hashes --progress-spinner off \
    --requirement "$file" > "$log" 2>&1; then
    echo "$file: $(tail -n 1 "$log")"
  elif grep -qE 'ConnectionError|ServiceError|Timeout' "$log"; then
    echo "AUDIT SKIPPED: $file was not audited, because the list of vulnerabilities cannot be reached." >&2
    echo "Run \`make audit\` where the internet can be reached: $(grep -oE "host='[^']+'" "$log" | head -n 1)" >&2
    exit "$status"
  else
    cat "$log"
    status=1
  fi
done
exit "$status"
