"""openpi's own client drives this package's server: PORT.

Runs in an environment with openpi-client from PyPI, which needs numpy below 2.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def observation(seed: int) -> dict:
    random = np.random.default_rng(seed)
    images = {
        name: random.integers(0, 256, (3, 84, 112), dtype=np.uint8)
        for name in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    }
    return {
        "images": images,
        "state": random.uniform(-0.5, 0.5, 14),
        "prompt": "touch the red cube with the left arm",
    }


def main(port: int) -> int:
    client = WebsocketClientPolicy("127.0.0.1", port)
    metadata = client.get_server_metadata()
    assert metadata["robot"] == "aloha" and metadata["action_horizon"] == 50, metadata
    answer = client.infer(observation(0))
    assert answer["actions"].shape == (50, 14) and answer["actions"].dtype == np.float32
    assert np.isfinite(answer["actions"]).all() and answer["policy_timing"]["infer_ms"] > 0
    assert "prev_total_ms" in client.infer(observation(1))["server_timing"]
    broker = ActionChunkBroker(client, action_horizon=10)
    steps = [broker.infer(observation(2))["actions"] for _ in range(12)]
    assert all(step.shape == (14,) for step in steps)
    try:
        client.infer({"images": {}, "state": np.zeros(14), "prompt": "wave"})
    except RuntimeError as error:
        assert "no image of this policy's cameras" in str(error), error
    else:
        raise AssertionError("an observation without images was answered")
    print(f"openpi-client {version('openpi-client')}: chunks, broker and errors as with openpi")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
