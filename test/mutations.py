"""Takes the protections out one by one and says which tests notice.

    python test/mutations.py [--only 4 8]

Each mutation is a small change of the text of a temporary copy of the package; the tests that pin
the promise (docs/reliability.md numbers them) run against the copy. Prints a Markdown table; the
exit code is 1 if a mutation went unseen or its tests fail without it.
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
COPIED = ("pi05_ros", "test", "config", "benchmarks", "docs", "launch", "msg")
FILES = ("pyproject.toml",)
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Mutation:
    """One protection and what becomes of it."""

    promise: int
    what: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


def mutation(
    promise: int, what: str, file: str, *texts: str, tests: Sequence[str] | str
) -> Mutation:
    """`texts`: what stands there, what is to stand there, and so on in turn."""
    edits = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Mutation(promise, what, file, edits, (tests,) if isinstance(tests, str) else (*tests,))


INPUTS = "test/nodes/faults/test_fault_inputs.py::test_"
MOTION = "test/nodes/faults/test_fault_motion.py::test_"
DIRECT = "test/nodes/faults/test_fault_direct.py::test_"
POLICY = "test/nodes/faults/test_fault_policy.py::test_"
BUFFER = "test/observation/test_buffer.py::test_"
MUTATIONS = (
    mutation(1, "a frame's age is not looked at", "observation/stream.py",
             "        if age_s > max_age_s:", "        if False:",
             tests=(INPUTS + "a_stopped_stream_is_a_warning_and_then_an_error",
                    BUFFER + "each_gate_blocks_alone_and_names_stream_and_limit")),
    mutation(2, "cameras may be any time apart", "observation/buffer.py",
             "        if skew_s > self.gates.max_skew_s:", "        if False:",
             tests=(INPUTS + "inputs_that_must_not_be_used_stop_inference[cameras]",
                    BUFFER + "each_gate_blocks_alone_and_names_stream_and_limit")),
    mutation(3, "joints are taken in the order of the message", "observation/decode.py",
             "position[[index[name] for name in names]]", "position[: len(names)]",
             tests=(INPUTS + "joints_are_matched_by_name",
                    "test/observation/test_decode.py::test_joints_are_found_by_name_in_any_order")),
    mutation(3, "a joint may be given twice", "observation/decode.py",
             "        if name in index:", "        if False:",
             tests=INPUTS + "inputs_that_must_not_be_used_stop_inference[joints]"),
    mutation(4, "NaN passes", "executor/results.py",
             "    if not finite.all():", "    if False:",
             tests=(POLICY + "failures_in_a_row_deactivate",
                    "test/test_executor.py::test_a_chunk_that_must_not_move_a_robot_is_an_error")),
    mutation(4, "failures are not counted", "executor/watchdog.py",
             "            self._failures += 1", "            pass",
             tests=POLICY + "failures_in_a_row_deactivate"),
    mutation(5, "positions are not limited", "control/limits.py",
             "        goals = np.minimum(np.maximum(targets, self.lower), self.upper)",
             "        goals = targets",
             "            np.maximum(cap, np.negative(to_lower, out=to_lower), out=bound)\n"
             "            np.minimum(bound, to_upper, out=bound)",
             "            bound[:] = cap",
             tests=(MOTION + "any_targets_stay_inside_the_limits",
                    "test/control/test_limits.py::"
                    "test_limits_hold_for_any_targets_from_any_admissible_state")),
    mutation(5, "the URDF is read and not heeded", "nodes/urdf_limits.py",
             "    return tight\n", "    return joints\n",
             tests="test/nodes/test_robot_description_limits.py"),
    mutation(6, "velocities are not limited", "control/limits.py",
             "            np.maximum(want, -self.max_velocity, out=cap)\n"
             "            np.minimum(cap, self.max_velocity, out=cap)",
             "            cap[:] = want",
             tests=(MOTION + "any_targets_stay_inside_the_limits",
                    "test/control/test_limits.py::"
                    "test_limits_hold_for_any_targets_from_any_admissible_state")),
    mutation(6, "accelerations are not limited", "control/limits.py",
             "            np.maximum(bound, low, out=next_velocity)\n"
             "            np.minimum(next_velocity, high, out=next_velocity)",
             "            next_velocity[:] = bound",
             tests=(MOTION + "any_targets_stay_inside_the_limits",
                    "test/control/test_limits.py::"
                    "test_limits_hold_for_any_targets_from_any_admissible_state")),
    mutation(7, "the late result of a hang is used", "runner/requests.py",
             "        if hang:\n            self._executor.discard()\n", "",
             tests=(POLICY + "a_hang_is_told_and_outlived",
                    "test/test_runner.py::"
                    "test_a_hang_leads_to_the_tail_and_its_result_is_thrown_away")),
    mutation(7, "chunks are read past their end", "control/chunks.py",
             "            steps = np.minimum(np.maximum(steps, 0.0), self._lasts)",
             "            steps = np.maximum(steps, 0.0)",
             tests=("test/control/test_scheduler.py::"
                    "test_the_last_action_is_held_beyond_the_horizon",)),
    mutation(8, "a stop is not kept", "runner/policy_runner.py",
             "        self._stopped = True\n", "",
             tests=(MOTION + "stop_is_latched_until_resume",
                    "test/test_runner.py::test_stop_is_latched_until_resume")),
    mutation(8, "results in flight outlive a stop", "runner/requests.py",
             "        self._executor.discard()\n        self._last_observation_s = -math.inf",
             "        self._last_observation_s = -math.inf",
             tests="test/test_runner.py::test_deactivation_discards_what_is_in_flight"),
    mutation(9, "old chunks stay beside the new instruction's", "runner/policy_runner.py",
             "                self.scheduler.clear()\n            self._instruction = chunk",
             "                pass\n            self._instruction = chunk",
             "                self.executor.discard()\n        return instruction",
             "                pass\n        return instruction",
             tests=("test/test_runner.py::test_a_new_instruction_discards_the_old_ones_chunk",)),
    mutation(10, "instructions of any length", "observation/instruction.py",
             "    if len(text) > max_chars:", "    if False:",
             tests=(INPUTS + "an_instruction_changes_in_mid_chunk",
                    BUFFER + "an_instruction_that_is_none_is_refused_and_the_old_one_stays")),
    mutation(10, "instructions may carry a state", "observation/instruction.py",
             "    _refuse_labels(text)\n", "",
             tests="test/observation/test_instruction.py"),
    mutation(10, "the state may be cut from the prompt", "policy/policy.py",
             "            raise PromptTooLongError(", "            PromptTooLongError(",
             tests="test/policy/test_policy.py::"
                   "test_an_instruction_without_room_for_the_state_is_refused"),
    mutation(8, "a restart does not wait for rest", "runner/start.py",
             "        if now_s < rest_s:", "        if False:",
             "joint_history(rest_s)", "joint_history(now_s - 1.0)",
             tests="test/test_runner_start.py::"
                   "test_a_start_needs_joint_states_from_after_the_rest"),
    mutation(11, "commands go out without a controller", "nodes/control_thread.py",
             "        if lost or (self.conflicts and not self._dry_run):", "        if False:",
             tests=(MOTION + "a_controller_that_is_gone_stops_the_stream",
                    DIRECT + "the_other_arm_brakes_when_a_controller_is_lost",
                    "test/nodes/test_control_thread.py::"
                    "test_a_lost_controller_brakes_the_others")),
    mutation(11, "a recorder counts as a controller", "nodes/outputs.py",
             "name not in UNKNOWN_NODES and not name.startswith(OBSERVERS)", "True",
             tests=(DIRECT + "a_recorder_does_not_keep_the_commands_going",
                    "test/nodes/test_outputs.py::test_a_recorder_is_no_controller")),
    mutation(12, "tensors may be missing", "policy/checkpoint.py",
             '[name for name in expected if name not in index]', '[]',
             tests="test/policy/test_checkpoint.py::test_tensors_that_do_not_fit"),
    mutation(12, "cameras that the policy does not have", "nodes/assembly.py",
             "        if name not in policy.cameras:", "        if False:",
             tests="test/nodes/test_policy_node.py::test_what_does_not_fit_is_refused_by_name"),
    mutation(13, "pickles are not looked for", "policy/weights.py",
             'PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")', "PICKLE_SUFFIXES = ()",
             tests="test/policy/test_checkpoint.py::test_pickles_are_refused"),
    mutation(14, "data may be too short", "observation/decode.py",
             "    if data.size < step * height:", "    if False:",
             tests="test/observation/test_decode.py::"
                   "test_an_image_that_is_none_is_refused_by_field"),
    mutation(14, "a PNG's parts may claim any length", "observation/picture_header.py",
             '    while kind != b"IEND":', "    while False:",
             tests="test/observation/test_picture_header.py"),
    mutation(14, "a damaged picture counts against the policy", "executor/watchdog.py",
             "        elif result.stamp_s is not None or result.kind is ErrorKind.OUT_OF_MEMORY:",
             "        else:",
             tests=(INPUTS + "a_picture_that_changes_in_mid_stream",
                    "test/test_watchdog.py")),
    mutation(14, "images may repeat for ever", "observation/buffer.py",
             "            if fault is None and frozen is not None and frozen.unusable:",
             "            if False:",
             tests=("test/nodes/faults/test_fault_images.py",
                    "test/observation/test_image_watch.py")),
    mutation(14, "images may have one colour for ever", "observation/image_watch.py",
             "self._rules.refuse_one_colour and is_one_colour(image)", "False",
             tests="test/observation/test_image_watch.py"),
    mutation(15, "the middleware's events go unheard", "nodes/qos_watch.py",
             "            incompatible_qos=lambda event: self._tell(topic, event, \"publisher\")\n",
             "",
             tests=INPUTS + "incompatible_qos_is_named"),
    mutation(16, "the clock may jump", "runner/policy_runner.py",
             "        if passed_s < -dt_s or passed_s > max(CLOCK_JUMP_S, 5 * dt_s):",
             "        if False:",
             tests=(INPUTS + "a_clock_that_jumps_starts_over",
                    "test/test_runner.py::test_a_clock_that_jumps_forward_starts_over")),
    mutation(17, "a device's fault only deactivates", "nodes/policy_node.py",
             "        if self._device_fault:", "        if False:",
             tests=POLICY + "a_device_that_fails_ends_in_error_processing"),
    mutation(17, "out of memory is a failed inference", "executor/inference.py",
             "        if result.kind is ErrorKind.OUT_OF_MEMORY:", "        if False:",
             tests=(POLICY + "out_of_memory_is_recovered_in_place",
                    "test/test_executor.py::test_out_of_memory_is_recovered_by_one_repetition")),
    mutation(17, "a lost device is a failure as any other", "executor/watchdog.py",
             "        elif result.kind is ErrorKind.STICKY:", "        elif False:",
             tests="test/test_watchdog.py::test_a_lost_device_is_a_fault_at_once"),
    mutation(18, "ready without warm-up", "executor/inference.py",
             "        self._warm_up(policy)\n", "",
             tests="test/test_executor.py"),
    mutation(18, "a load is waited for without end", "nodes/policy_node.py",
             "executor.wait_ready(parameters.load_timeout_s)", "executor.wait_ready(30.0)",
             tests=POLICY + "a_load_that_hangs_fails_in_time"),
    mutation(19, "no first command is far", "control/approach.py",
             "        if away[worst] <= self._distance:", "        if True:",
             tests=(MOTION + "a_far_first_command_is_ramped_to_or_refused",
                    "test/control/test_approach.py")),
    mutation(20, "a dry run publishes", "nodes/control_thread.py",
             "            if not self._dry_run and not runner.stopped:",
             "            if not runner.stopped:",
             tests=MOTION + "a_dry_run_publishes_no_command"),
    mutation(20, "the speed changes at once", "control/pacing.py",
             "        ramp_s = abs(scale - rate) * self._ramp_s", "        ramp_s = 0.0",
             tests="test/control/test_pacing.py"),
    mutation(20, "the speed is not taken", "nodes/policy_node.py",
             "                runner.set_speed(scheduling.speed_scale, self.now_s())",
             "                pass",
             tests=MOTION + "speed_zero_comes_to_rest_and_resumes"),
    mutation(21, "commanded is not compared with measured", "control/tracking.py",
             "        excess = self.errors / self.limits", "        excess = 0.0 * self.errors",
             tests=(MOTION + "a_joint_that_does_not_follow_stops_the_arms",
                    "test/test_runner_tracking.py")),
    mutation(22, "joint states may jump before a start", "control/start_check.py",
             "        problem = self._jump(stamps_s, positions) or self._outside(positions[-1])",
             '        problem = ""',
             tests=(MOTION + "no_motion_starts_at_a_wrong_joint_state",
                    "test/test_runner_start.py")),
    mutation(23, "a signal ends the process at once", "nodes/spinning.py",
             "                brake()", "                pass",
             tests="test/nodes/test_spinning.py::"
                   "test_a_signal_brakes_before_anything_is_shut_down"),
    mutation(24, "any number of publishers", "nodes/publisher_watch.py",
             "            if self._node.count_publishers(topic) < 2:", "            if True:",
             tests=(DIRECT + "a_second_publisher_stops_the_motion",
                    "test/nodes/test_outputs.py::test_a_second_publisher_is_named")),
    mutation(25, "a controller may replace by age", "nodes/controller_check.py",
             "        if controller.replaces:", "        if False:",
             tests="test/nodes/test_outputs.py::"
                   "test_a_controller_that_replaces_by_age_moves_nothing"),
    mutation(26, "late trajectories are sent", "nodes/control_thread.py",
             "        if tick.trajectory is not None and not stream.in_time(now_s):",
             "        if False:",
             tests="test/nodes/test_control_thread.py::test_a_late_trajectory_is_not_sent"),
    mutation(27, "a stop waits for a load", "nodes/spinning.py",
             "        if self._is_transition(entity):", "        if False:",
             tests=(DIRECT + "a_stop_is_served_while_a_policy_loads",
                    "test/nodes/test_spinning.py::"
                    "test_a_transition_runs_beside_the_services")),
    mutation(28, "parameters may be set without effect", "nodes/policy_node.py",
             "        if late and (runner is not None or self._configuring):", "        if False:",
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
        text = file.read_text(encoding="utf-8")
        for before, after in wanted.edits:
            if text.count(before) != 1:
                raise SystemExit(f"{wanted.file} has {text.count(before)} times: {before!r}")
            text = text.replace(before, after)
        file.write_text(text, encoding="utf-8")
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
