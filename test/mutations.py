"""Takes the protections out one by one and says which tests notice.

    python test/mutations.py [--only 4 8]

Each mutation changes one function in a temporary copy of the package (`test/support/mutate.py`).
The tests that pin the promise (docs/reliability.md numbers them) run against the copy. Prints a
Markdown table; the exit code is 1 if a mutation goes unnoticed or its tests fail without it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "test" / "support"))
from mutate import apply  # noqa: E402

COPIED = (
    "pi05_ros",
    "pi05_lab",
    "test",
    "config",
    "benchmarks",
    "docs",
    "launch",
    "msg",
    "examples",
)
FILES = ("pyproject.toml",)
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Mutation:
    """One protection and its removal."""

    promise: int
    what: str
    file: str
    edits: tuple[tuple[str, str, str], ...]
    """(function, pattern, replacement) in turn, as `mutate.mutate` takes them."""
    tests: tuple[str, ...]


def mutation(
    promise: int, what: str, file: str, function: str, *texts: str, tests: Sequence[str] | str
) -> Mutation:
    """`texts`: pattern, replacement, and so on in turn, all in `function`."""
    edits = tuple((function, *pair) for pair in zip(texts[::2], texts[1::2], strict=True))
    return Mutation(promise, what, file, edits, (tests,) if isinstance(tests, str) else (*tests,))


NODES = "test/runtime/nodes/"
INPUTS = NODES + "faults/test_fault_inputs.py::test_"
MOTION = NODES + "faults/test_fault_motion.py::test_"
DIRECT = NODES + "faults/test_fault_direct.py::test_"
POLICY = NODES + "faults/test_fault_policy.py::test_"
OBSERVATION = "test/runtime/observation/"
CONTROL = "test/runtime/control/"
RUNNER = "test/runtime/"
BUFFER = OBSERVATION + "test_buffer.py::test_"
LIMITS = CONTROL + "test_limits.py::test_limits_hold_for_any_targets_from_any_admissible_state"
MUTATIONS = (
    mutation(1, "the age of a frame is not checked", "observation/stream.py", "Stream.fault",
             "_ > max_age_s", "False",
             tests=(INPUTS + "a_stopped_stream_is_a_warning_and_then_an_error",
                    BUFFER + "each_gate_blocks_alone_and_names_stream_and_limit")),
    mutation(2, "cameras may be any time apart", "observation/buffer.py",
             "ObservationBuffer._select_frames", "_ > self.gates.max_skew_s", "False",
             tests=(INPUTS + "inputs_that_must_not_be_used_stop_inference[cameras]",
                    BUFFER + "each_gate_blocks_alone_and_names_stream_and_limit")),
    mutation(3, "joints are taken in the order of the message", "observation/decode.py",
             "decode_joint_state", "position[[index[name] for name in names]]",
             "position[: len(names)]",
             tests=(INPUTS + "joints_are_matched_by_name",
                    OBSERVATION + "test_decode.py::test_joints_are_found_by_name_in_any_order")),
    mutation(3, "a joint may be given twice", "observation/decode.py", "decode_joint_state",
             "if name in _:\n    _", "pass",
             tests=INPUTS + "inputs_that_must_not_be_used_stop_inference[joints]"),
    mutation(4, "NaN passes", "executor.py", "check_chunk", "not _.all()", "False",
             tests=(POLICY + "failures_in_a_row_deactivate",
                    RUNNER + "test_executor.py::"
                             "test_a_chunk_that_must_not_move_a_robot_is_an_error")),
    mutation(4, "failures are not counted", "requests.py", "Watchdog.record_result",
             "self._failures += 1", "pass", tests=POLICY + "failures_in_a_row_deactivate"),
    mutation(5, "positions are not limited", "control/limits.py", "MotionLimiter.follow",
             "np.minimum(np.maximum(targets, self.lower), self.upper)", "targets",
             "np.minimum(bound, to_upper, out=bound)", "bound[:] = cap",
             tests=(MOTION + "any_targets_stay_inside_the_limits", LIMITS)),
    mutation(5, "the limits of the URDF are ignored", "nodes/assembly.py", "apply_limits",
             "return tight", "return joints", tests=NODES + "test_robot_description_limits.py"),
    mutation(6, "velocities are not limited", "control/limits.py", "MotionLimiter.follow",
             "np.maximum(want, -self.max_velocity, out=cap)", "cap.__setitem__(..., want)",
             "np.minimum(cap, self.max_velocity, out=cap)", "None",
             tests=(MOTION + "any_targets_stay_inside_the_limits", LIMITS)),
    mutation(6, "accelerations are not limited", "control/limits.py", "MotionLimiter.follow",
             "np.maximum(bound, low, out=next_velocity)", "next_velocity.__setitem__(..., bound)",
             "np.minimum(next_velocity, high, out=next_velocity)", "None",
             tests=(MOTION + "any_targets_stay_inside_the_limits", LIMITS)),
    mutation(7, "the late result of a hang is used", "requests.py", "InferenceRequests.poll",
             "if hang:\n    _", "pass",
             tests=(POLICY + "a_hang_is_a_problem_until_it_ends",
                    RUNNER + "test_runner.py::"
                             "test_a_hang_leads_to_the_tail_and_its_result_is_discarded")),
    mutation(7, "chunks are read past their end", "control/chunks.py",
             "ChunkScheduler._predictions", "np.minimum(np.maximum(_, 0.0), _)",
             "np.maximum(steps, 0.0)",
             tests=CONTROL + "test_scheduler.py::"
                             "test_the_last_action_is_held_beyond_the_horizon"),
    mutation(8, "a stop is not kept", "runner.py", "PolicyRunner.stop",
             "self.stopped = True", "pass",
             tests=(MOTION + "stop_is_latched_until_resume",
                    RUNNER + "test_runner.py::test_stop_is_latched_until_resume")),
    mutation(8, "running inferences outlive a stop", "requests.py", "InferenceRequests.reset",
             "self._executor.discard()", "None",
             tests=RUNNER + "test_runner.py::test_deactivation_discards_what_is_in_flight"),
    mutation(8, "a restart does not wait for rest", "runner.py", "PolicyRunner._checked_start",
             "now_s < rest_s", "False",
             "self.buffer.joint_history(rest_s)", "self.buffer.joint_history(now_s - 1.0)",
             tests=RUNNER + "test_runner_start.py::"
                            "test_a_start_needs_joint_states_from_after_the_rest"),
    mutation(9, "old chunks stay beside those of a new instruction", "runner.py",
             "PolicyRunner._process", "self.scheduler.clear()", "None",
             tests=RUNNER + "test_runner.py::"
                            "test_a_new_instruction_discards_the_old_ones_chunk"),
    mutation(10, "instructions may have any length", "observation/instruction.py",
             "checked_instruction", "_ > max_chars", "False",
             tests=(INPUTS + "an_instruction_changes_in_mid_chunk",
                    BUFFER + "an_invalid_instruction_is_refused_and_the_old_one_stays")),
    mutation(10, "instructions may contain a state", "observation/instruction.py",
             "checked_instruction", "_refuse_labels(text)", "None",
             tests=OBSERVATION + "test_instruction.py"),
    mutation(10, "the state may be cut from the prompt", "policy/policy.py",
             "Policy._encode_with_state", "raise PromptTooLongError(___)", "pass",
             tests=RUNNER + "policy/test_policy.py::"
                            "test_an_instruction_without_room_for_the_state_is_refused"),
    mutation(11, "commands are sent without a controller", "nodes/control_thread.py",
             "ControlThread._step", "lost or (self.conflicts and _)", "False",
             tests=(MOTION + "a_controller_that_is_gone_stops_the_stream",
                    DIRECT + "the_other_arm_brakes_when_a_controller_is_lost",
                    NODES + "test_control_thread.py::test_a_lost_controller_brakes_the_others")),
    mutation(11, "a recorder counts as a controller", "nodes/outputs.py", "Output._moves",
             "_ and not name.startswith(OBSERVERS)", "True",
             tests=(DIRECT + "a_recorder_does_not_keep_the_commands_going",
                    NODES + "test_outputs.py::test_a_recorder_is_no_controller")),
    mutation(12, "tensors may be missing", "policy/checkpoint.py", "check_tensors",
             "[name for name in expected if name not in index]", "[]",
             tests=RUNNER + "policy/test_checkpoint.py::test_tensors_that_do_not_fit"),
    mutation(12, "cameras may be unknown to the policy", "nodes/assembly.py", "check_fit",
             "name not in policy.cameras", "False",
             tests=NODES + "test_policy_node.py::test_what_does_not_fit_is_refused_by_name"),
    mutation(13, "pickles are accepted", "policy/weights.py", "",
             "PICKLE_SUFFIXES = _", "PICKLE_SUFFIXES = ()",
             tests=RUNNER + "policy/test_checkpoint.py::test_pickles_are_refused"),
    mutation(14, "image data may be too short", "observation/decode.py", "decode_image",
             "data.size < _", "False",
             tests=OBSERVATION + "test_decode.py::"
                                 "test_a_bad_image_is_refused_by_field"),
    mutation(14, "chunks of a PNG may claim any length", "observation/decode.py", "_png_header",
             'kind != b"IEND"', "False", tests=OBSERVATION + "test_decode.py"),
    mutation(14, "a damaged image counts as a failure of the policy", "requests.py",
             "Watchdog.record_result",
             "_ is not None or result.kind is ErrorKind.OUT_OF_MEMORY", "True",
             tests=(INPUTS + "an_image_that_changes_in_mid_stream",
                    RUNNER + "test_requests.py")),
    mutation(14, "images may repeat without end", "observation/buffer.py",
             "ObservationBuffer._select_frames", "_ and _ and frozen.unusable", "False",
             tests=(NODES + "faults/test_fault_images.py", OBSERVATION + "test_stream.py")),
    mutation(14, "images may have one colour without end", "observation/stream.py",
             "ImageWatch.record_decoded", "self._rules.refuse_one_colour and _", "False",
             tests=OBSERVATION + "test_stream.py"),
    mutation(15, "QoS events are ignored", "nodes/graph_checks.py",
             "QosMonitor.subscription_events",
             'self._on_event(topic, event, "publisher")', "None",
             tests=INPUTS + "incompatible_qos_is_named"),
    mutation(16, "the clock may jump", "runner.py", "PolicyRunner._check_clock",
             "passed_s < _ or passed_s > _", "False",
             tests=(INPUTS + "a_clock_that_jumps_starts_over",
                    RUNNER + "test_runner.py::test_a_clock_that_jumps_forward_starts_over")),
    mutation(17, "a device fault only deactivates", "nodes/policy_node.py",
             "PolicyNode.on_deactivate", "self._device_fault", "False",
             tests=POLICY + "a_device_that_fails_ends_in_error_processing"),
    mutation(17, "out of memory is a failed inference", "executor.py",
             "InferenceExecutor._serve", "result.kind is _", "False",
             tests=(POLICY + "out_of_memory_is_recovered_in_place",
                    RUNNER + "test_executor.py::"
                             "test_out_of_memory_is_recovered_by_one_repetition")),
    mutation(17, "a lost device is an ordinary failure", "requests.py",
             "Watchdog.record_result", "result.kind is ErrorKind.STICKY", "False",
             tests=RUNNER + "test_requests.py::test_a_lost_device_is_a_fault_at_once"),
    mutation(18, "ready without warm-up", "executor.py", "InferenceExecutor._load_and_serve",
             "self._warm_up(policy)", "None", tests=RUNNER + "test_executor.py"),
    mutation(18, "a load has no time limit", "nodes/policy_node.py", "PolicyNode._configure",
             "executor.wait_ready(___)", "executor.wait_ready(30.0)",
             tests=POLICY + "a_load_that_hangs_fails_in_time"),
    mutation(19, "no first command is far", "control/speed.py", "StartRamp.begin",
             "_ <= self._distance", "True",
             tests=(MOTION + "a_far_first_command_is_ramped_to_or_refused",
                    CONTROL + "test_speed.py")),
    mutation(20, "a dry run publishes", "nodes/control_thread.py", "ControlThread._step",
             "not self._dry_run and not runner.stopped", "not runner.stopped",
             tests=MOTION + "a_dry_run_publishes_no_command"),
    mutation(20, "the speed changes at once", "control/speed.py", "SpeedScaler.set_scale",
             "abs(_) * self._ramp_s", "0.0", tests=CONTROL + "test_speed.py"),
    mutation(20, "the speed is not applied", "nodes/policy_node.py",
             "PolicyNode._on_set_parameters", "configured.runner.set_speed(___)", "None",
             tests=MOTION + "speed_zero_comes_to_rest_and_resumes"),
    mutation(21, "commanded is not compared with measured", "control/tracking.py",
             "TrackingMonitor._check_errors", "self.errors / self.limits", "0.0 * self.errors",
             tests=(MOTION + "a_joint_that_does_not_follow_stops_the_arms",
                    RUNNER + "test_runner_tracking.py")),
    mutation(22, "joint states may jump before a start", "control/start_check.py",
             "StartCheck.check", "self._jump(___) or self._outside(___)", '""',
             tests=(MOTION + "no_motion_starts_at_a_wrong_joint_state",
                    RUNNER + "test_runner_start.py")),
    mutation(23, "a signal ends the process at once", "nodes/spinning.py", "_Process.on_signal",
             "self.node.brake()", "None",
             tests=NODES + "test_spinning.py::"
                           "test_a_signal_brakes_before_anything_is_shut_down"),
    mutation(24, "any number of publishers", "nodes/graph_checks.py", "second_publishers",
             "_ < 2", "True",
             tests=(DIRECT + "a_second_publisher_stops_the_motion",
                    NODES + "test_outputs.py::test_a_second_publisher_is_named")),
    mutation(25, "a controller may replace by age", "nodes/graph_checks.py",
             "ControllerCheck._problem", "if controller.replaces:\n    _", "pass",
             tests=NODES + "test_outputs.py::"
                           "test_a_controller_that_replaces_by_age_moves_nothing"),
    mutation(26, "late trajectories are sent", "nodes/control_thread.py", "ControlThread._send",
             "_ is not None and not stream.in_time(now_s)", "False",
             tests=NODES + "test_control_thread.py::test_a_late_trajectory_is_not_sent"),
    mutation(27, "a stop waits for a load", "nodes/spinning.py", "TransitionExecutor.spin_once",
             "self._is_transition(___)", "False",
             tests=(DIRECT + "a_stop_is_served_while_a_policy_loads",
                    NODES + "test_spinning.py::"
                            "test_a_transition_runs_beside_the_services")),
    mutation(28, "parameters may be set without effect", "nodes/policy_node.py",
             "PolicyNode._on_set_parameters", "late and _", "False",
             tests=MOTION + "what_is_read_at_configure_is_refused_in_motion"),
)  # fmt: skip


def copy_tree(target: Path) -> None:
    for name in COPIED:
        shutil.copytree(
            ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "images")
        )
    for name in FILES:
        shutil.copy(ROOT / name, target / name)


def run_tests(tree: Path, tests: Sequence[str]) -> list[str]:
    """The tests that fail in `tree`, by name; a run that ends otherwise has a name of its own."""
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-rfE", "--tb=no", *tests],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", finished.stdout, re.MULTILINE)
    if finished.returncode not in (0, 1):
        failed.append(f"pytest ended with {finished.returncode}: {finished.stdout[-200:]}")
    return failed


def try_out(wanted: Mutation) -> tuple[list[str], int]:
    """The tests that went red, once each without their parameters, and how many runs they were."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        file = tree / "pi05_ros" / wanted.file
        file.write_text(apply(file.read_text(encoding="utf-8"), wanted.edits), encoding="utf-8")
        failed = run_tests(tree, wanted.tests)
    return sorted({name.split("[")[0] for name in failed}), len(failed)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of promises")
    options = parser.parse_args(args)
    chosen = [m for m in MUTATIONS if not options.only or m.promise in options.only]
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        failed = run_tests(Path(folder), sorted({test for m in chosen for test in m.tests}))
    if failed:
        print(f"red without any mutation: {', '.join(failed)}")
        return 1
    print("| promise | taken out | where | tests that went red |")
    print("|---|---|---|---|")
    unseen = 0
    for wanted in chosen:
        names, count = try_out(wanted)
        unseen += not names
        red = ", ".join(f"`{name}`" for name in names) or "**none**"
        red += f" ({count} cases)" if count > len(names) else ""
        print(f"| {wanted.promise} | {wanted.what} | `{wanted.file}` | {red} |", flush=True)
    print(f"\n{len(chosen) - unseen} of {len(chosen)} seen")
    return int(unseen > 0)


if __name__ == "__main__":
    raise SystemExit(main())
