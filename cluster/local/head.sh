#!/usr/bin/env bash
# A Ray head on this machine, in the foreground, with a token: whoever reaches a Ray cluster's ports can otherwise run code.
#   cluster/local/head.sh [more options of `ray start --head`]
# Then, in another terminal: disthess submit CONFIG --address http://127.0.0.1:8265
# Ctrl-C, or SIGTERM to this process, ends it. Other Ray processes of this machine are left alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$token_file" ]; then
    mkdir -p "$(dirname "$token_file")"
    (umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token_file")
    echo "made a token: $token_file" >&2
fi
exec ray start --head --block --disable-usage-stats --include-dashboard=true --dashboard-host=127.0.0.1 "$@"
