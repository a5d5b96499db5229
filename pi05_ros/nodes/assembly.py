"""What `configure` builds from the parameters: the joints' limits, the policy and its executor."""

from __future__ import annotations

import functools
import gc
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from rclpy.node import Node
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image
from std_msgs.msg import String

from pi05_ros.config import (
    CameraParameters,
    GuidanceParameters,
    LimitsParameters,
    ParameterError,
    PolicyParameters,
    SchedulerParameters,
)
from pi05_ros.control.urdf import UrdfError, intersect_limits, read_urdf_limits
from pi05_ros.executor import InferenceExecutor
from pi05_ros.nodes.messages import LATCHED_QOS, decode_stored_image, image_message
from pi05_ros.observation.instruction import checked_instruction
from pi05_ros.types import ActionPrefix, JointGroup, Policy


def apply_limits(node: Node, limits: LimitsParameters, joints: JointGroup) -> JointGroup:
    """`joints` with the limits of `limits.source`; blocks until a URDF arrives, if one is needed.

    Raises:
        ParameterError: no URDF comes in time, or it does not fit the joints.
    """
    if limits.source == "params":
        return joints
    topic = node.resolve_topic_name(limits.topic)
    messages: queue.SimpleQueue[String] = queue.SimpleQueue()
    subscription = node.create_subscription(String, topic, messages.put, LATCHED_QOS)
    try:
        message = messages.get(timeout=limits.timeout_s)
    except queue.Empty:
        raise ParameterError(
            f"limits.source is urdf, but no URDF came on {topic} within {limits.timeout_s:g} s: "
            "is robot_state_publisher running? Else set limits.source to params"
        ) from None
    finally:
        node.destroy_subscription(subscription)
    try:
        tight = intersect_limits(joints, read_urdf_limits(message.data, joints.names))
    except UrdfError as error:
        raise ParameterError(f"limits.source urdf, {topic}: {error}") from None
    pairs = zip(joints.joints, tight.joints, strict=True)
    narrower = [before.name for before, after in pairs if before != after]
    node.get_logger().info(f"limits: {topic} narrows {', '.join(narrower) or 'no joint'}")
    return tight


def load_policy(parameters: PolicyParameters, guidance: GuidanceParameters) -> Policy:
    """Load the checkpoint; called on the executor thread, which owns the device."""
    from pi05_ros.adapters.factory import open_policy

    return open_policy(
        parameters.checkpoint,
        robot=parameters.robot,
        device=parameters.device,
        dtype=None if parameters.dtype == "auto" else parameters.dtype,
        num_steps=parameters.num_steps,
        seed=None if parameters.seed < 0 else parameters.seed,
        threads=parameters.threads or max(1, (os.cpu_count() or 2) - 1),
        head=None if parameters.head == "auto" else parameters.head,
        execution=parameters.execution,
        fp8_prefix=parameters.fp8_prefix,
        guidance=vars(guidance),
    )


def make_executor(
    parameters: PolicyParameters,
    scheduling: SchedulerParameters,
    load: Callable[[], Policy],
    on_result: Callable[[], None],
) -> InferenceExecutor:
    """The executor of what `load` returns, with the hooks that a device needs."""
    return InferenceExecutor(
        load,
        warmup_prefixes=warmup_prefixes if scheduling.method == "rtc" else None,
        on_thread_start=functools.partial(lower_priority, parameters.inference_nice),
        on_result=on_result,
        on_out_of_memory=empty_device_cache,
        on_thread_end=release_device_memory,
    )


def warmup_prefixes(policy: Policy) -> Iterable[ActionPrefix]:
    """A prefix of half a chunk: guided sampling has kernels of its own to choose or compile."""
    steps = max(1, policy.horizon // 2)
    return [ActionPrefix(np.zeros((steps, policy.action_dim)), committed_steps=min(2, steps))]


def warm_up_decoder() -> None:
    """Load the reader of serialized images, 0.1 s that the first inference would wait for."""
    pixel = image_message(np.zeros((1, 1, 3), np.uint8), 0.0, "")
    decode_stored_image((Image, serialize_message(pixel)))


def usable_instruction(policy: Policy, text: str, max_chars: int) -> str:
    """The text as the robot's instruction, without surrounding blanks.

    Raises:
        ValueError: one line that says what is wrong with the text, by the common rules or by the
            policy's optional `check_instruction`.
    """
    instruction = checked_instruction(text, max_chars)
    getattr(policy, "check_instruction", lambda text: None)(instruction)
    return instruction


def empty_device_cache() -> None:
    """Return the unused GPU memory of torch's allocator."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def release_device_memory() -> None:
    """Free a dropped policy: its reference cycles and its memory on the GPU."""
    # configure freezes the policy's objects, which excludes them from collections
    gc.unfreeze()
    gc.collect()
    empty_device_cache()


def lower_priority(nice: int) -> None:
    """Lower the priority of the calling thread and of those that it starts; Linux only."""
    if nice and sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)


def device_memory_mb() -> dict[str, float]:
    """GPU memory of the network by name; empty without a GPU, or while torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {
        "device memory MB": torch.cuda.memory_allocated() / 1e6,
        "device memory peak MB": torch.cuda.max_memory_allocated() / 1e6,
    }


def check_fit(
    policy: Policy, joints: JointGroup, cameras: Mapping[str, CameraParameters]
) -> list[str]:
    """Check the params file against the policy; returns warnings.

    Joints are compared by name with the robot's description, where the policy has one: a joint that
    both have must be at the same index.

    Raises:
        ParameterError: they do not fit together.
    """
    for key, dim in (("state", policy.state_dim), ("action", policy.action_dim)):
        if dim != len(joints):
            raise ParameterError(
                f"joints.names has {len(joints)} joints, but the policy's {key} has {dim} values"
            )
    for name in cameras:
        if name not in policy.cameras:
            raise ParameterError(
                f"cameras.names: the policy has no camera {name!r}; it was made for "
                f"{list(policy.cameras)}"
            )
    known: Sequence[str] = getattr(policy, "joint_names", ()) or joints.names
    for index, name in enumerate(joints.names):
        if name in known and known.index(name) != index:
            raise ParameterError(
                f"joints.names: {name!r} is at place {index + 1}, but the robot's description has "
                f"it at place {known.index(name) + 1}; its order is {', '.join(known)}"
            )
    pairs = zip(joints.names, known, strict=True)
    renamed = ", ".join(f"{ours} is {theirs}" for ours, theirs in pairs if ours != theirs)
    warning = "joints.names has other names than the robot's description, so their order cannot be"
    return [f"{warning} checked: {renamed}"] if renamed else []
