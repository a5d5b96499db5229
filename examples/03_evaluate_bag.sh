#!/bin/sh
# Evaluate a policy on a recorded bag, without a robot. `pi05 demo --bag` records one:
# demo_out/bag.
#
# sh examples/03_evaluate_bag.sh BAG [FOLDER]
set -eu
output="${2:-evaluate_out}"

# One inference every 0.5 s; two schedulers side by side; every 4th inference also with a wrong
# instruction and with black images.
pi05 evaluate "$1" --checkpoint small --scheduler temporal_ensemble rtc \
    --every 0.5 --control-every 4 --output "$output"

echo "open $output/report.html"
