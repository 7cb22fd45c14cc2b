"""When a process that keeps ending may start again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.scheduler.backoff import STEADY_S, Ends, after_end, delay_s, ready_at


def test_the_first_starts_are_immediate_then_10_s_then_30_s() -> None:
    assert [delay_s(count) for count in (0, 1, 4, 5, 14, 15, 1000)] == [0, 0, 0, 10, 10, 30, 30]


def test_five_minutes_up_forget_what_was() -> None:
    assert after_end(Ends(40, 10), up_s=STEADY_S, at=500) == Ends(1, 500)
    assert after_end(Ends(40, 10), up_s=STEADY_S - 1, at=500) == Ends(41, 500)


def test_many_jobs_ending_together_are_no_crash_loop() -> None:
    ends = Ends()
    for _ in range(10):
        ends = after_end(ends, up_s=20, at=100)
    assert ready_at(ends, wanted=10) == 100
    assert ready_at(ends, wanted=1) == 110


@given(st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 1e9)), max_size=50), st.integers(0, 20))
def test_a_start_waits_30_s_at_most(history: list[tuple[float, float]], wanted: int) -> None:
    ends = Ends()
    for up_s, at in history:
        ends = after_end(ends, up_s=up_s, at=at)
    assert 0 <= ready_at(ends, wanted) - ends.last_at <= 30
    assert ends.last_at == max([0.0, *(at for _, at in history)])
