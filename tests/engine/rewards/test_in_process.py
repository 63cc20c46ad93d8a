"""A call in this process that is past its time is named, and ends the process or the wait."""

import threading
import time

from reward_requests import reward_requests

from glm_rlhf.engine.rewards.in_process import InProcessReward


def test_on_the_main_thread_the_process_ends_after_one_sentence(capsys):
    codes, has_ended = [], threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        has_ended.set()

    def hangs(requests) -> list[float]:
        assert has_ended.wait(60)
        return [1.0] * len(requests)

    reward = InProcessReward(hangs, name="rules:hangs", timeout_s=0.1, end=end)
    reward(reward_requests())
    assert codes == [2]
    assert "the reward function rules:hangs did not return within 0.1 s" in capsys.readouterr().err


def test_a_call_in_time_ends_nothing():
    codes = []
    reward = InProcessReward(lambda asked: [1.0] * len(asked), name="r", timeout_s=0.05, end=codes.append)
    assert reward(reward_requests()) == [1.0] * 3
    time.sleep(0.15)
    assert codes == []
    assert reward.overdue() is None


def test_in_a_thread_the_call_is_overdue_until_it_returns():
    has_ended = threading.Event()

    def hangs(requests) -> list[float]:
        has_ended.wait(60)
        return [1.0] * len(requests)

    reward = InProcessReward(hangs, name="rules:hangs", timeout_s=0.1)
    thread = threading.Thread(target=reward, args=(reward_requests(),))
    thread.start()
    deadline = time.monotonic() + 60
    while reward.overdue() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "cannot be ended in this process" in reward.overdue()
    has_ended.set()
    thread.join()
    assert reward.overdue() is None
