# Sourced by head.sh and worker.sh: the environment's programs first on PATH, and the token that the cluster asks for.
#   DISTHESS_BIN          the bin folder of the environment that has disthess; default .venv/bin of this checkout, if there
#   RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token      as for Ray itself; the last is made by head.sh if none is there
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
bin="${DISTHESS_BIN:-$checkout/.venv/bin}"
if [ -x "$bin/ray" ]; then export PATH="$bin:$PATH"; fi
command -v ray >/dev/null || {
    echo "no program ray: install disthess into $checkout/.venv, or set DISTHESS_BIN to its environment's bin folder" >&2
    exit 2
}
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
token_file="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
