"""Faults pinned: a report that needs a network or does not render, a verdict that contradicts the
figures, recorded text that becomes markup, errors that end in a traceback.
"""

from __future__ import annotations

import base64
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from offline_world import PARAMS, write_bag, write_params  # type: ignore[import-not-found]
from rosbags.highlevel import AnyReader

from pi05_lab.evaluation.open_loop.results import from_json
from pi05_lab.evaluation.open_loop.summary import Summary
from pi05_lab.evaluation.open_loop.verdict import UNSURE, verdicts
from pi05_ros.cli import main

VOID = {"meta", "link", "img", "br", "input", "hr"}
EVIL = "<script>alert(1)</script> & wave"


def evaluate(*arguments: object) -> int:
    given = [str(each) for each in arguments]
    if "--checkpoint" not in given:
        # Only the command line names code, never the params file.
        given += ["--checkpoint", "offline_world:oracle"]
    return main(["evaluate", *given])


class Page(HTMLParser):
    """Checks that tags are closed, and collects what a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.alts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has the handler {name}"
            kept = {"src": self.links, "href": self.links, "id": self.ids, "alt": self.alts}
            kept.get(name, []).append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recordings, an empty file, two policies, two schedulers."""
    root = tmp_path_factory.mktemp("command")
    write_params(root)
    write_bag(root / "bags" / "one", 2.0, servo_lag_s=0.02)
    write_bag(root / "bags" / "two", 1.5, lambda _: EVIL)
    (root / "bags" / "none").mkdir()
    (root / "bags" / "none" / "x.mcap").write_bytes(b"")
    code = evaluate(
        root / "bags", "--params-file", root / "params.yaml", "--output", root / "out",
        "--checkpoint", "offline_world:oracle", "offline_world:wild",
        "--scheduler", "latest", "temporal_ensemble",
        "--foxglove", root / "foxglove", "--control-every", 2,
    )  # fmt: skip
    assert code == 0
    return root


def test_the_report_is_one_valid_page_that_loads_nothing(reported: Path) -> None:
    text = (reported / "out" / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == []
    assert "script" not in found.tags and "iframe" not in found.tags
    for link in found.links:
        assert link.startswith(("data:", "#")), link
        if link.startswith("#"):
            assert link[1:] in found.ids
    assert "url(" not in text and "@import" not in text
    assert all(found.alts) and found.tags.count("img") == len(found.alts) > 10
    assert EVIL in "".join(found.texts)
    for link in found.links:
        if link.startswith("data:image/"):
            data = np.frombuffer(base64.b64decode(link.split(",")[1]), np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
            assert image is not None and min(image.shape[:2]) > 20
            assert image.shape[1] < 400 or image.std() > 5, "an empty plot"


def test_the_verdict_stands_first_and_the_sections_follow(reported: Path) -> None:
    text = " ".join(Page((reported / "out" / "report.html").read_text(encoding="utf-8")).texts)
    order = [
        "2 recordings, 2 episodes",
        "closer to the recording than holding position",
        "do not deploy",
        "no proof that it can do the task",
        "MAE rad",
        "boundary p50",
        "as recorded",
        "bags/one",
        "Worst samples",
        "Latency",
        "oracle: network",
        "/top/image_raw",
        "Dropped",
        "seems to be empty",
    ]
    places = [text.find(each) for each in order]
    assert [each for each, place in zip(order, places, strict=True) if place < 0] == []
    assert places[:3] == sorted(places[:3])
    assert max(places[:4]) < min(places[4:])


def test_metrics_are_json_with_the_figures_of_the_report(reported: Path) -> None:
    text = (reported / "out" / "metrics.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    metrics = json.loads(text)
    assert metrics["totals"]["recordings"] == 2 and metrics["totals"]["failed"] == 1
    oracle = metrics["policies"]["offline_world:oracle"]
    assert oracle["conditions"]["policy"]["mae_rad"] < oracle["conditions"]["hold"]["mae_rad"]
    assert set(oracle["schedulers"]) == {"latest", "temporal_ensemble"}
    assert oracle["latency"]["stages_ms"]["network"] == [12.0, 12.0, 12.0]
    assert set(oracle["joints"]) == {"shoulder", "elbow", "gripper"}
    assert oracle["joints"]["gripper"]["unit"] == "m"
    found = verdicts(from_json(Summary, metrics))
    grades = {each.policy: each.grade for each in found}
    # Two episodes are too few for a sure verdict.
    assert grades == {"offline_world:wild": UNSURE, "offline_world:oracle": UNSURE}
    headlines = {each.policy: each.headline for each in found}
    assert "further from the recording" in headlines["offline_world:wild"]


def test_foxglove_gets_the_recorded_topics_and_the_predicted_motion(reported: Path) -> None:
    files = sorted((reported / "foxglove").iterdir())
    assert len(files) == 2 and all(file.suffix == ".mcap" for file in files)
    with AnyReader([files[0]]) as reader:
        counts = {topic: info.msgcount for topic, info in reader.topics.items()}
        assert counts["/top/image_raw"] == counts["/recorded/joint_states"] == 100
        assert counts["/predicted/chunk"] == 10
        assert counts["/predicted/offline_world_wild/chunk"] == 10
        assert counts["/predicted/joint_states"] > 80
        assert counts["/predicted/offline_world_oracle/temporal_ensemble/joint_states"] > 80
        connection = next(c for c in reader.connections if c.topic == "/predicted/chunk")
        _, stamp_ns, data = next(iter(reader.messages([connection])))
        chunk: Any = reader.deserialize(data, connection.msgtype)
    assert (chunk.header.stamp.sec, stamp_ns) == (100, 100_000_000_000)
    assert chunk.joint_names == ["shoulder", "elbow", "gripper"]
    assert len(chunk.points) == 10
    assert chunk.points[3].time_from_start.nanosec == 150_000_000
    assert chunk.points[0].positions[0] == pytest.approx(0.01)


def test_foxglove_layout_shows_topics_that_the_file_has() -> None:
    path = Path(__file__).parents[4] / "config" / "foxglove_layout.json"
    text = path.read_text(encoding="utf-8")
    layout = json.loads(text)
    assert {"configById", "layout"} <= set(layout)
    for topic in ("/cam_high/image_raw", "/recorded/joint_states", "/predicted/joint_states"):
        assert topic in text
    panels = set(layout["configById"])

    def leaves(node: Any) -> list[str]:
        return [node] if isinstance(node, str) else leaves(node["first"]) + leaves(node["second"])

    assert set(leaves(layout["layout"])) == panels


def test_two_runs_without_timings_give_the_same_bytes(tmp_path: Path) -> None:
    write_params(tmp_path)
    write_bag(tmp_path / "bags" / "a", 1.5)
    write_bag(tmp_path / "bags" / "b", 1.5, lambda _: "bow")
    pages = []
    for name in ("x", "y"):
        arguments = ["--params-file", tmp_path / "params.yaml", "--no-timings"]
        arguments += ["--output", tmp_path / name]
        assert evaluate(tmp_path / "bags", *arguments) == 0
        files = [(tmp_path / name / file).read_bytes() for file in ("report.html", "metrics.json")]
        pages.append(files)
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recording"),
        (["/nowhere"], "/nowhere does not exist"),
        (["{bag}", "--every", "0"], "every_s must be above 0"),
        (["{bag}", "--workers", "0"], "--workers must be at least 1"),
        (["{bag}", "--params-file", "/no.yaml"], "/no.yaml"),
        (["{bag}", "--checkpoint", "offline_world:missing"], "offline_world:missing"),
        (["{bag}", "--checkpoint", "/no/checkpoint"], "/no/checkpoint"),
        (["{bag}", "--checkpoint", "small", "--head", "fast"], "predicts no action tokens"),
        (["{bag}", "--namespace", "other"], "no /other/top/image_raw"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = write_bag(tmp_path / "bag", 0.2)
    params = ["--params-file", write_params(tmp_path)] if "--params-file" not in arguments else []
    filled = [each.format(bag=bag) for each in arguments]
    assert evaluate(*filled, *params, "--output", tmp_path / "out") == 1
    printed = "".join(capsys.readouterr())
    assert message in printed and "Traceback" not in printed


def test_rerun_receives_everything_or_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stub replaces Rerun's library, which is an optional extra."""
    bag = write_bag(tmp_path / "bag", 1.0)
    arguments = [bag, "--params-file", write_params(tmp_path), "--output", tmp_path / "out"]
    arguments += ["--rerun", tmp_path / "x.rrd"]
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert evaluate(*arguments) == 1
    assert "pip install 'pi05_ros[rerun]'" in capsys.readouterr().err

    logged: dict[str, int] = {}
    times: list[float] = []

    class Stream:
        def __init__(self, application: str, recording_id: str) -> None:
            assert recording_id == "bag"

        def save(self, path: str) -> None:
            Path(path).write_bytes(b"RRF2")

        def set_time(self, timeline: str, timestamp: float) -> None:
            times.append(timestamp)

        def log(self, entity: str, what: object) -> None:
            logged[entity] = logged.get(entity, 0) + 1

        def flush(self) -> None: ...

        def disconnect(self) -> None:
            logged["end"] = 1

    stand_in = SimpleNamespace(
        RecordingStream=Stream,
        Scalars=float,
        TextLog=str,
        LineStrips2D=lambda strips, labels: strips,
        EncodedImage=lambda contents, media_type: contents,
    )
    monkeypatch.setitem(sys.modules, "rerun", stand_in)
    assert evaluate(*arguments) == 0
    assert logged["joints/shoulder/recorded"] == 50 and logged["instruction"] == 1
    assert logged["cameras/top"] == 10 and logged["end"] == 1
    assert logged["chunks/offline_world:oracle"] == 5
    assert logged["joints/elbow/offline_world:oracle_latest"] > 30
    assert min(times) >= 100.0 and max(times) < 101.1


def test_the_params_files_checkpoint_and_compressed_transport_are_read(tmp_path: Path) -> None:
    from pi05_lab.data.topics import read_evaluated_robot

    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.replace("transport: raw", "transport: compressed"))
    robot = read_evaluated_robot(path, namespace="/cell/")
    assert robot.checkpoint == "offline_world:oracle"
    assert list(robot.cameras[0].topics) == [
        "/cell/top/image_raw/compressed",
        "/cell/top/image_raw",
    ]
    assert robot.controllers[0].topic == "/cell/arm_controller/joint_trajectory"
    assert robot.instruction_topics == ("/cell/instruction", "/cell/policy/active_instruction")


def test_the_record_command_names_the_topics_that_an_evaluation_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--record-command", "--params-file", write_params(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ros2 bag record --storage mcap")
    named = set(printed.split("--topics")[1].split())
    with AnyReader([write_bag(tmp_path / "bag", 0.2)]) as reader:
        assert set(reader.topics) == named - {"/policy/active_instruction"}


def test_a_missing_extra_is_named_before_anything_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("command", "report"):
        monkeypatch.delitem(sys.modules, f"pi05_lab.evaluation.open_loop.{name}")
    bag = write_bag(tmp_path / "bag", 0.2)
    with pytest.raises(SystemExit) as stop:
        evaluate(bag, "--params-file", write_params(tmp_path), "--output", tmp_path / "o")
    printed = str(stop.value)
    assert "matplotlib" in printed and "pip install 'pi05_ros[eval,train]'" in printed
    assert not (tmp_path / "o").exists()


def test_a_params_file_cannot_name_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins: a YAML file from elsewhere whose checkpoint "module:function" was called."""
    called: list[bool] = []
    module = SimpleNamespace(function=lambda: called.append(True))
    monkeypatch.setitem(sys.modules, "named_by_yaml", module)  # type: ignore[arg-type]
    params = write_params(tmp_path)
    params.write_text(params.read_text().replace("offline_world:oracle", "named_by_yaml:function"))
    bag = write_bag(tmp_path / "bag", 0.2)
    options = [str(bag), "--params-file", str(params), "--output", str(tmp_path / "out")]
    assert main(["evaluate", *options]) == 1
    printed = capsys.readouterr().err
    assert not called
    assert "named_by_yaml:function" in printed and "--checkpoint" in printed
