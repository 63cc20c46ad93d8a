"""What the benchmark of generation asks for, and what it says of its rows."""

from benchmarks.generation.answers import verdict
from benchmarks.generation.mixes import LONGEST_ANSWER, SHAPE, mixes
from benchmarks.generation.ticks import tick_verdict
from glm_rlhf.engine.bench.harness import Entry, Timing
from glm_rlhf.engine.bench.report import Row


def test_mixes_have_the_lengths_that_the_notes_state():
    equal, _, uniform, tail = mixes()
    assert {len(prompt) for prompt in equal.prompts} == {24}
    assert set(equal.lengths) == {48}
    assert sorted(uniform.lengths) == list(range(8, 72))
    assert {len(prompt) for prompt in uniform.prompts} == set(range(8, 41))
    assert uniform.prompts == tail.prompts
    assert tail.lengths.count(LONGEST_ANSWER) == 8
    short = [length for length in tail.lengths if length != LONGEST_ANSWER]
    assert 14 < sum(short) / len(short) < 17  # quantiles without the last ones, which the long ones replace
    assert all(3 <= token < SHAPE["vocab_size"] for prompt in tail.prompts for token in prompt)


def row(what, ours_s, theirs_s):
    entries = [
        Entry(name=name, timing=Timing(median_s=median_s, low_s=0.0, high_s=9.0, repetitions=5))
        for name, median_s in (("ours", ours_s), ("theirs", theirs_s))
    ]
    return Row(row="1 thread", what=what, shape="", command="", entries=entries)


def test_a_verdict_judges_the_worst_thread_count_and_only_where_there_is_a_target():
    rows = [row("equal, greedy", 1.0, 1.2), row("uniform, sampled", 1.0, 2.0), row("long tail", 1.0, 3.5)]
    assert verdict(rows) == "equal, greedy: 1.20 ×; uniform, sampled: 2.00 × (met); long tail: 3.50 × (met)."
    rows.append(row("uniform, sampled", 1.0, 1.4))
    assert "uniform, sampled: 2.00 and 1.40 × (missed)" in verdict(rows)
    failed = Row(
        row="", what="equal", shape="", command="", entries=[Entry(name="ours", status="wrong: 9")] * 2
    )
    assert verdict([failed]) == "not shown: wrong: 9 (equal)."


def test_idle_turns_are_judged_by_the_worst_stage():
    def of_stages(*percents):
        entries = [Entry(name="stage", figures={"idle %, steady": percent}) for percent in percents]
        return Row(row="pipeline of 2", what="", shape="", command="", entries=entries)

    assert "at most 4.9 % in the steady state, target 5% (met)" in tick_verdict([of_stages(0.0, 4.9)])
    assert "(missed)" in tick_verdict([of_stages(0.0, 1.0), of_stages(5.2, 0.0)])
