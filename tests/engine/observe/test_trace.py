"""Traces: a file that Perfetto reads, also of a killed run, and the seconds that a rank waited."""

import json
import threading
import time

from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.observe.trace import Trace, tracing


def test_phases_are_seconds_and_spans(tmp_path):
    before = time.time() * 1e6
    with tracing(tmp_path, rank=3) as trace:
        phases = Phases()
        with phases.phase("outer"):
            for _ in range(2):
                with phases.phase("inner"):
                    time.sleep(0.01)
        trace.record("wait", 1.0, 1.25)
        trace.record("wait", 2.0, 2.5)
        trace.record("wait", 3.0, 3.0 + 2**-17)  # 8 microseconds: counted, not written
        assert trace.take_wait_s() == 0.75 + 2**-17
        assert trace.take_wait_s() == 0.0
    events = json.loads((tmp_path / "trace" / "rank_3.json").read_text())
    spans = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["pid"], event["tid"]) for event in spans] == [
        ("inner", 3, 0),
        ("inner", 3, 0),
        ("outer", 3, 0),
        ("wait", 3, 1),
        ("wait", 3, 1),
    ]
    assert before <= spans[2]["ts"] <= spans[0]["ts"] <= time.time() * 1e6
    seconds = phases.seconds
    assert seconds["timing_s/outer"] >= seconds["timing_s/inner"] >= 0.02
    # In whole microseconds, and within what is timed: the processor may be taken away in between.
    assert 0.02e6 - 2 <= spans[0]["dur"] + spans[1]["dur"] <= seconds["timing_s/inner"] * 1e6 + 2


def test_background_threads_are_threads_of_their_own(tmp_path):
    trace = Trace(tmp_path / "rank_0.json", rank=0)
    for name in ("reward 0", "reward 1", "reward 0"):
        thread = threading.Thread(target=trace.record, args=("reward call", 1.0, 2.0), name=name)
        thread.start()
        thread.join()
    trace.record("generate", 0.0, 3.0)
    trace.close()
    events = json.loads((tmp_path / "rank_0.json").read_text())
    assert [event["tid"] for event in events if event["ph"] == "X"] == [2, 3, 2, 0]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "work", 1: "wait", 2: "reward 0", 3: "reward 1"}


def test_a_killed_run_leaves_whole_lines(tmp_path):
    trace = Trace(tmp_path / "rank_0.json", rank=0)
    trace.record("generate", 1.0, 2.0)
    trace.take_wait_s()
    text = (tmp_path / "rank_0.json").read_text()
    assert json.loads(text + "]")[-1]["dur"] == 1e6
    trace.close()
