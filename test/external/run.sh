#!/bin/sh
# LeRobot itself reads what this package writes. Not part of `make test`: lerobot needs Python 3.12
# and brings torch with its CUDA packages, about 3 GB.
#
#     test/external/run.sh [ENVIRONMENT]      PYTHON=python3.12, PI05=.venv/bin/pi05
#
# ENVIRONMENT is a folder for the virtual environment; an existing one is used.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
pi05=${PI05:-.venv/bin/pi05}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
environment=${1:-$work/lerobot}

if [ ! -x "$environment/bin/python" ]; then
    "${PYTHON:-python3.12}" -m venv "$environment"
    "$environment/bin/pip" install --quiet "lerobot[dataset]>=0.6.1,<0.7"
fi

"$pi05" record --output "$work/bags" --format mcap --episodes 3 --tasks touch,wave --workers 1
"$pi05" convert "$work"/bags/* "$work/images" --no-video
"$pi05" convert "$work"/bags/* "$work/video" --fps 25 --trim
"$pi05" record --output "$work/recorded" --episodes 2 --tasks wave --workers 1 --labels chunk
for data in images video recorded; do
    "$(dirname "$pi05")/python" "$here/dataset_numbers.py" "$work/$data" "$work/$data.npz"
    "$environment/bin/python" "$here/lerobot_reads.py" "$work/$data" "$work/$data.npz"
done
