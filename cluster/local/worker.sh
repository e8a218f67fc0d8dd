#!/usr/bin/env bash
# Another machine joins the head's cluster, in the foreground. It needs the head's token: copy ~/.ray/auth_token there (mode 600).
#   cluster/local/worker.sh HEAD:6379 [more options of `ray start`]
# Ctrl-C, or SIGTERM to this process, takes it away again; its tiles go to the others.
set -euo pipefail
address="${1:?usage: cluster/local/worker.sh HEAD:6379 [options of ray start]}"
shift
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$token_file" ]; then
    echo "no token in $token_file: copy the head's there, mode 600, or set RAY_AUTH_TOKEN" >&2
    exit 2
fi
exec ray start --address="$address" --block --disable-usage-stats "$@"
