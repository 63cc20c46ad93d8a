"""The watchdog: silent while there is progress, else one line, the stacks, and the end."""

import time

from glm_rlhf.engine.health.watchdog import HUNG, watchdog
from glm_rlhf.parallel.runtime.spans import heartbeat, span


def test_a_rank_without_progress_says_where_it_stands_and_ends(capfd):
    codes = []
    with span("update"), span("policy"), watchdog(0.2, rank=3, end=codes.append):
        time.sleep(0.6)
    assert codes == [HUNG]
    text = capfd.readouterr().err
    assert "[rank 3] hung for 0 s in phase update/policy: in no collective, at " in text
    assert "most recent call first" in text
    assert "test_watchdog.py" in text


def test_progress_of_any_kind_keeps_it_silent(capfd):
    codes = []
    with watchdog(0.4, rank=0, end=codes.append):
        for turn in range(8):
            time.sleep(0.1)
            if turn % 2:
                heartbeat()
            else:
                with span("update"):
                    pass
    with watchdog(None, rank=0, end=codes.append):
        time.sleep(0.5)
    assert codes == []
    assert capfd.readouterr().err == ""
