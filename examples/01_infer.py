"""Infer a chunk of actions from images, a joint state and an instruction.

python examples/01_infer.py
"""

import time

import numpy as np

from pi05_ros.policy import Policy
from pi05_ros.types import Observation

# "small" is the embedded network; a folder or a Hugging Face id loads a full π0.5.
policy = Policy.from_pretrained("small", robot="aloha", device="cpu")
print(policy.description)

observation = Observation(
    images={name: np.zeros((480, 640, 3), np.uint8) for name in policy.cameras},
    state=np.zeros(policy.state_dim),
    instruction="touch the red cube with the left arm",
    stamp_s=time.time(),
)
chunk = policy.infer(observation)

for step in range(0, chunk.horizon, 10):
    due_s = chunk.stamp_s + step * chunk.dt_s
    print(f"t + {due_s - observation.stamp_s:.2f} s:", np.round(chunk.actions[step], 3))
