"""A scheduler of one's own: the median of all chunks that cover a time.

`PolicyRunner.use_scheduler` takes it, and `pi05_ros.runner_factory.make_runner` shows where.

python examples/05_scheduler.py
"""

import numpy as np

from pi05_ros.control.chunks import ChunkScheduler
from pi05_ros.types import ActionChunk


class MedianScheduler(ChunkScheduler):
    """One outlier among three or more chunks has no effect; grippers follow the newest chunk."""

    def merge(self, predictions, covered):
        newest = predictions[-1]
        if covered is not None:
            predictions = np.where(covered[..., None], predictions, np.nan)
        return np.where(self._gripper, newest, np.nanmedian(predictions, axis=0))


scheduler = MedianScheduler(gripper=[False, True], max_chunks=8)
for stamp_s, target in ((0.0, 1.0), (0.1, 1.1), (0.2, 9.0)):  # the last chunk is an outlier
    chunk = ActionChunk(np.full((50, 2), target), stamp_s, dt_s=0.02)
    scheduler.add(chunk, now_s=stamp_s + 0.1)

targets = scheduler.targets(np.array([0.3, 0.5]))
print("joint, gripper at 0.3 s and 0.5 s:", targets.tolist())
assert targets.tolist() == [[1.1, 9.0], [1.1, 9.0]]
