#!/bin/sh
# openpi's own client drives this package's server. Not part of `make test`: openpi-client needs
# numpy below 2, an environment of its own.
#
#     test/external/openpi.sh [ENVIRONMENT]      PYTHON=python3, PI05=.venv/bin/pi05
set -eu
here=$(cd "$(dirname "$0")" && pwd)
pi05=${PI05:-.venv/bin/pi05}
work=$(mktemp -d)
server=
trap 'test -z "$server" || kill -INT "$server"; rm -rf "$work"' EXIT
environment=${1:-$work/openpi}

if [ ! -x "$environment/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    # the last two are imported by the client, which does not declare them
    "$environment/bin/pip" install --quiet openpi-client "numpy<2" typing_extensions dm-tree
fi

"$pi05" serve small --port 0 > "$work/log" 2>&1 &
server=$!
until grep -q '^ws://' "$work/log"; do
    kill -0 "$server" || { cat "$work/log"; exit 1; }
    sleep 0.5
done
"$environment/bin/python" "$here/openpi_client_runs.py" "$(sed -n 's|^ws://.*:||p' "$work/log")"
