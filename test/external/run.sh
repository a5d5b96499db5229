#!/bin/sh
# LeRobot itself reads what this package writes, and LeRobot's policies run in this package's node.
# Not part of `make test`: lerobot needs Python 3.12 and brings torch with its CUDA packages, 3 GB.
# Without the installation it takes about 6 minutes on two cores.
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
    "$environment/bin/pip" install --quiet "lerobot[dataset,diffusion,smolvla]>=0.6.1,<0.7"
fi

"$pi05" record --output "$work/bags" --format mcap --episodes 3 --tasks touch,wave --workers 1
"$pi05" convert "$work"/bags/* "$work/images" --no-video
"$pi05" convert "$work"/bags/* "$work/video" --fps 25 --trim
"$pi05" record --output "$work/recorded" --episodes 2 --tasks wave --workers 1 --labels chunk
for data in images video recorded; do
    "$(dirname "$pi05")/python" "$here/dataset_numbers.py" "$work/$data" "$work/$data.npz"
    "$environment/bin/python" "$here/lerobot_reads.py" "$work/$data" "$work/$data.npz"
done

# LeRobot's policies: adapter and rollout compared, a training and an evaluation by LeRobot's own
# tools, and all of them in the node. HF_HUB_OFFLINE: nothing of it may need a download.
export HF_HUB_OFFLINE=1
"$environment/bin/pip" install --quiet --editable "$here/../..[sim,eval]"
"$environment/bin/python" "$here/lerobot_policies.py" "$work/policies"
"$environment/bin/lerobot-train" --dataset.repo_id=local/data --dataset.root="$work/recorded" \
    --policy.type=act --policy.device=cpu --policy.push_to_hub=false \
    --policy.pretrained_backbone_weights=null --policy.dim_model=64 --policy.n_heads=4 \
    --policy.dim_feedforward=64 --policy.n_encoder_layers=1 --policy.latent_dim=8 \
    --policy.chunk_size=50 --policy.n_action_steps=50 --steps=10 --batch_size=4 --num_workers=0 \
    --wandb.enable=false --output_dir="$work/trained"
trained="$work/trained/checkpoints/last/pretrained_model"
"$environment/bin/lerobot-eval" --env.discover_packages_path=pi05_lab.sim.lerobot_plugin \
    --env.type=pi05_aloha --env.episode_length=50 --policy.path="$trained" --policy.device=cpu \
    --eval.n_episodes=1 --eval.batch_size=1 --output_dir="$work/evaluated"
"$environment/bin/pi05" check "$trained"
"$environment/bin/python" "$here/node_runs.py" "$trained" "$work/policies/act" \
    "$work/policies/diffusion" "$work/policies/smolvla"
