"""The scheduler's comparison, over all the states that hypothesis can think of."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from controller.scheduler.diff import LIVING, Group, Plan, SeenJob, Start, Stop, diff

GROUPS = [Group(app, release, type) for app in "ab" for release in "12" for type in ("web", "clock")]
groups = st.sampled_from(GROUPS)
wanted_counts = st.dictionaries(groups, st.integers(0, 5))
jobs = st.lists(
    st.builds(
        SeenJob,
        id=st.uuids().map(str),
        group=st.one_of(groups, st.just(Group("a", "1", "")), st.just(Group("gone", "1", "web"))),
        host_id=st.sampled_from(["one", "two"]),
        state=st.sampled_from(["pending", "starting", "up", "stopping", "down", "crashed", "failed"]),
        created_at=st.integers(0, 100).map(float),
        is_adoptable=st.booleans(),
    ),
    max_size=25,
)


def carried_out(plan: Plan, seen: list[SeenJob]) -> list[SeenJob]:
    stopped = {stop.job_id for stop in plan.stops}
    left = [job for job in seen if job.id not in stopped]
    for start in plan.starts:
        for number in range(start.count):
            left.append(SeenJob(f"new-{start.group}-{number}", start.group, "one", "pending", 1000))
    return left


def living(seen: list[SeenJob]) -> Counter[Group]:
    return Counter(job.group for job in seen if job.state in LIVING)


@given(wanted_counts, jobs)
def test_carrying_out_the_plan_gives_what_is_wanted_and_then_nothing_is_left_to_do(
    wanted: dict[Group, int], seen: list[SeenJob]
) -> None:
    after = carried_out(diff(wanted, seen), seen)
    counts = living(after)
    for group in wanted:
        assert counts[group] == wanted[group]
    again = diff(wanted, after)
    assert (again.starts, again.stops) == ((), ())


@given(wanted_counts, jobs)
def test_nothing_is_both_started_and_stopped_in_one_group(wanted: dict[Group, int], seen: list[SeenJob]) -> None:
    plan = diff(wanted, seen)
    group_of = {job.id: job.group for job in seen}
    assert not {start.group for start in plan.starts} & {group_of[stop.job_id] for stop in plan.stops}
    assert len({stop.job_id for stop in plan.stops}) == len(plan.stops)


@given(wanted_counts, jobs)
def test_one_offs_and_ended_jobs_are_left_alone(wanted: dict[Group, int], seen: list[SeenJob]) -> None:
    alone = {job.id for job in seen if not job.group.type or job.state not in LIVING}
    assert not alone & {stop.job_id for stop in diff(wanted, seen).stops}


@given(wanted_counts, jobs, st.sampled_from("ab"))
def test_of_a_deleted_app_everything_stops_and_nothing_starts(
    wanted: dict[Group, int], seen: list[SeenJob], app: str
) -> None:
    plan = diff(wanted, seen, deleted_apps={app})
    assert all(start.group.app_id != app for start in plan.starts)
    stopped = {stop.job_id for stop in plan.stops}
    assert all(job.id in stopped for job in seen if job.group.app_id == app and job.state in LIVING)


@given(wanted_counts, jobs, st.sets(groups))
def test_a_held_group_starts_nothing_but_is_known_to_lack(
    wanted: dict[Group, int], seen: list[SeenJob], held: set[Group]
) -> None:
    free, plan = diff(wanted, seen), diff(wanted, seen, held=held)
    assert not held & {start.group for start in plan.starts}
    assert plan.missing == free.missing
    assert plan.stops == free.stops


@given(jobs)
def test_the_order_in_which_jobs_are_seen_does_not_matter(seen: list[SeenJob]) -> None:
    wanted = {GROUPS[0]: 1}
    assert diff(wanted, seen) == diff(wanted, seen[::-1])


def test_surplus_goes_not_up_first_then_newest_so_that_the_longest_serving_stays() -> None:
    web = GROUPS[0]
    seen = [
        SeenJob("old", web, "one", "up", 1),
        SeenJob("new", web, "one", "up", 9),
        SeenJob("coming", web, "one", "starting", 5),
        SeenJob("waiting", web, "one", "pending", 2),
    ]
    stops = [stop.job_id for stop in diff({web: 1}, seen).stops]
    assert stops == ["waiting", "coming", "new"]


def test_what_bootstrap_started_waits_for_its_formation_and_is_then_adopted() -> None:
    web = GROUPS[0]
    seen = [SeenJob("first", web, "one", "up", 1, is_adoptable=True)]
    assert diff({}, seen) == Plan((), (), {})
    assert diff({web: 1}, seen) == Plan((), (), {})
    assert diff({web: 2}, seen).starts == (Start(web, 1),)
    newer = web._replace(release_id="2")
    assert diff({newer: 1}, seen).stops == (Stop("first", "one", "unwanted"),)
