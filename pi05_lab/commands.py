"""The lab's commands, which `pi05` finds by the entry point `pi05_ros.commands`."""

from pi05_ros.cli import Command

BENCH = "Benchmark chunk schedulers, or the latency of a chunk"
COMMANDS = (
    Command("demo", "Run the policy node on the simulated ALOHA and report", "Start",
            "pi05_lab.demo.command:demo", "sim,eval"),
    Command("convert", "Convert recorded bags into a LeRobot data set", "Learn",
            "pi05_lab.data.command:convert", "train"),
    Command("record", "Record demonstrations of the scripted experts", "Learn",
            "pi05_lab.data.command:record", "sim,train"),
    Command("dagger", "Roll out a policy, label its states with the experts", "Learn",
            "pi05_lab.data.command:dagger", "sim,train"),
    Command("train", "Train or fine-tune on LeRobot data sets", "Learn",
            "pi05_lab.training.command:train", "train"),
    Command("evaluate", "Evaluate a policy on bags or data sets, open loop", "Evaluate",
            "pi05_lab.evaluation.open_loop.command:evaluate", "eval,train"),
    Command("sim-eval", "Evaluate a policy in the simulator, closed loop", "Evaluate",
            "pi05_lab.evaluation.closed_loop.command:sim_eval", "sim,eval"),
    Command("bench scheduler", "Chunk schedulers by delay: success, jerk, stalls", "Evaluate",
            "pi05_lab.bench.scheduler_command:scheduler", "sim,eval", BENCH),
    Command("bench latency", "The time of a chunk by stage, in each execution mode", "Evaluate",
            "pi05_lab.bench.latency_command:latency", "", BENCH),
)  # fmt: skip
