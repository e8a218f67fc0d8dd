#!/usr/bin/env bash
# One machine: one Ray actor per GPU if the run file says `device: cuda`, else one per two cores. A private Ray, gone when the
# run ends.
#   cluster/local/run.sh CONFIG [more options of `disthess run`]
set -euo pipefail
config="${1:?usage: cluster/local/run.sh CONFIG [options of disthess run]}"
shift

if grep -Eq 'device: *"?cuda' "$config"; then
    workers="$(nvidia-smi -L | wc -l)"
    threads=4
else
    cores="$(nproc)"
    threads=$(( cores < 2 ? 1 : 2 ))
    workers=$(( cores / threads ))
fi
exec disthess run "$config" --executor ray --workers "$workers" --threads "$threads" "$@"
