"""Another policy behind the protocol: this one moves every joint to zero in two seconds.

pi05 evaluate BAG --checkpoint 04_other_policy:make        (with examples/ on PYTHONPATH)
python examples/04_other_policy.py                         (through the executor, as in the node)
"""

import numpy as np

from pi05_ros.executor import InferenceExecutor, black_observation
from pi05_ros.types import ActionChunk, ActionPrefix, Observation


class GoToZero:
    """All that `pi05_ros.types.Policy` asks for."""

    horizon, dt_s = 50, 0.02
    state_dim = action_dim = 14
    cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    description = "moves every joint to zero"

    def infer(self, observation: Observation, prefix: ActionPrefix | None = None) -> ActionChunk:
        left = 1 - self.dt_s * np.arange(1, self.horizon + 1) / 2.0
        actions = np.asarray(observation.state) * left[:, None]
        return ActionChunk(actions, observation.stamp_s, self.dt_s, observation.instruction)


make = GoToZero

if __name__ == "__main__":
    executor = InferenceExecutor(GoToZero)
    executor.start()
    policy = executor.wait_ready(timeout_s=10.0)
    executor.submit(lambda: black_observation(policy))
    while not executor.has_results:
        pass
    (result,) = executor.results()
    print(policy.description, "→", result.chunk and result.chunk.actions.shape, result.error or "")
    executor.stop(timeout_s=1.0)
