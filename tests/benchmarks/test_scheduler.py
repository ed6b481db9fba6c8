"""The simulation against closed forms and conservation laws; the workload against its formulas."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.events import LONGEST, MEMORY, Job, Stage, Station, simulate  # noqa: E402
from benchmarks.rates import Rate, Rates, measured  # noqa: E402
from benchmarks.scheduler import Curve, Run, pieces, run  # noqa: E402
from benchmarks.workload import (  # noqa: E402
    GIB,
    Cluster,
    Work,
    eight_h200,
    jobs,
    llama_70b,
    many_experts,
    one_h200,
    ray_cluster,
    this_machine,
)

from benchmarks import scaling_page, scheduler_figure  # noqa: E402

RATES = Rates()


def job(*stages: tuple[str, float], memory: float = 0.0, needs: tuple[int, ...] = ()) -> Job:
    return Job("j", tuple(Stage(*s) for s in stages), memory, needs)


# --- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "nodes", "servers"), [("cluster", 1, 1), ("cluster", 8, 1), ("node", 4, 1), ("node", 4, 3)]
)
def test_one_station_takes_the_total_over_its_servers(scope: str, nodes: int, servers: int) -> None:
    count = 120
    o = simulate([job(("disk", 0.25))] * count, {"disk": Station(servers, scope)}, nodes=nodes)  # type: ignore[arg-type]
    whole = servers * (nodes if scope == "node" else 1)
    assert o.makespan == pytest.approx(count * 0.25 / whole) and o.utilisation("disk") == pytest.approx(1.0)
    assert o.bottleneck == "disk" and o.least == pytest.approx(o.makespan) and o.servers["disk"] == whole


def test_equal_jobs_through_a_line_of_stations() -> None:
    """m jobs through single servers: one passage, and m - 1 times the slowest."""
    stages = (("a", 0.1), ("b", 0.7), ("c", 0.2))
    o = simulate([job(*stages)] * 9, {name: Station(1) for name, _ in stages})
    assert o.makespan == pytest.approx(1.0 + 8 * 0.7) and o.bottleneck == "b"
    assert list(o.ended) == pytest.approx([1.0 + 0.7 * i for i in range(9)])


def test_memory_makes_jobs_wait_and_is_named() -> None:
    stations = {"cpu": Station(8)}
    free = simulate([job(("cpu", 1.0), memory=6)] * 4, stations, memory=24)
    tight = simulate([job(("cpu", 1.0), memory=6)] * 4, stations, memory=10)
    assert free.makespan == 1.0 and free.peak_memory == 24
    assert tight.makespan == 4.0 and tight.peak_memory == 6 and tight.bottleneck == MEMORY
    two = simulate([job(("cpu", 1.0), memory=6)] * 4, stations, nodes=2, memory=10)
    assert two.makespan == 2.0
    with pytest.raises(ValueError, match="cut it into groups"):
        simulate([job(("cpu", 1.0), memory=6)], stations, memory=5)


def test_the_longest_job_is_named_and_needs_are_kept() -> None:
    stations = {"cpu": Station(4)}
    o = simulate([job(("cpu", 5.0)), *[job(("cpu", 1.0))] * 3], stations)
    assert o.makespan == 5.0 and o.bottleneck == LONGEST
    parts = [*[job(("cpu", 1.0))] * 4, job(("cpu", 2.0), needs=(0, 1, 2, 3))]
    o = simulate(parts, stations)
    assert o.makespan == 3.0 and o.longest == 3.0 and o.ended[4] == 3.0
    with pytest.raises(ValueError, match="does not come before"):
        simulate([job(("cpu", 1.0), needs=(1,)), job(("cpu", 1.0))], stations)
    assert simulate([], stations).makespan == 0.0


def test_jobs_in_flight_are_bounded() -> None:
    o = simulate([job(("wait", 1.0))] * 12, {"wait": Station(100)}, nodes=2, in_flight=3)
    assert o.makespan == 2.0 and o.refused == 0.0


stage = st.tuples(st.sampled_from(["one", "few", "node"]), st.floats(0.0, 5.0))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.lists(stage, min_size=1, max_size=4), st.floats(0, 4)), min_size=1, max_size=25),
    st.integers(1, 4), st.floats(4, 9), st.integers(1, 6), st.data(),
)  # fmt: skip
def test_no_station_works_longer_than_it_has_and_no_schedule_beats_the_bounds(
    drawn: list[tuple[list[tuple[str, float]], float]], nodes: int, memory: float, in_flight: int, data: st.DataObject
) -> None:
    todo = []
    for i, (stages, held) in enumerate(drawn):
        needs = tuple(data.draw(st.sets(st.integers(0, i - 1), max_size=2))) if i else ()
        todo.append(job(*stages, memory=held, needs=needs))
    stations = {"one": Station(1, "cluster"), "few": Station(3, "cluster"), "node": Station(2)}
    o = simulate(todo, stations, nodes=nodes, memory=memory, in_flight=in_flight)
    everything = sum(seconds for stages, _ in drawn for _, seconds in stages)
    assert o.least <= o.makespan * (1 + 1e-9) + 1e-9 and o.makespan <= everything * (1 + 1e-9) + 1e-9
    for name in stations:
        assert o.busy[name] <= o.servers[name] * o.makespan * (1 + 1e-9) + 1e-9
        assert o.busy[name] == pytest.approx(sum(x for stages, _ in drawn for s, x in stages if s == name))
    assert o.peak_memory <= memory + 1e-9 and 0.0 <= o.refused <= o.makespan + 1e-9
    for i, j in enumerate(todo):
        own = sum(s.seconds for s in j.stages)
        assert o.ended[i] >= own - 1e-9 and all(o.ended[n] <= o.ended[i] - own + 1e-9 for n in j.needs)
    assert simulate(todo, stations, nodes=nodes, memory=memory, in_flight=in_flight) == o, "nothing is random"


# --- the workload -------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_a_70b_model() -> None:
    shapes = llama_70b()
    assert len(shapes) == 562 and len(llama_70b(embeddings=False)) == 560
    assert sum(n * m for _, (n, m) in shapes) == pytest.approx(70.55e9, rel=1e-3)  # 70.6 billion with its norms
    assert len(many_experts()) == 10_000
    cut = pieces(shapes, 8192)
    assert sum(n * m for _, (n, m) in cut) == sum(n * m for _, (n, m) in shapes)
    assert max(n for _, (n, _) in cut) == 28672 and len({name for name, _ in cut}) == len(cut)


def test_bytes_and_operations_of_a_small_pool() -> None:
    shape, k, r = (64, 48), 5, 4
    dense = Work("d", (("w", shape),), "dense", k, r)
    adapters = Work("a", (("w", shape), ("v", shape)), "low-rank", k, r, "pairwise")
    assert dense.total("read_bytes") == 6 * 64 * 48 * 2 and dense.total("write_bytes") == 64 * 48 * 2
    assert adapters.total("read_bytes") == 2 * 5 * (64 + 48) * 4 * 2
    assert adapters.total("write_bytes") == 2 * 5 * (64 + 48) * 4 * 4
    assert (dense.pairs, adapters.pairs, dense.unions, adapters.unions) == (4, 10, 4, 20)
    assert adapters.total("factor_flops") == 2 * 5 * 6 * 112 * 16
    assert dense.effective_rank((64, 3)) == 3


def test_a_disk_alone_gives_bytes_over_bandwidth() -> None:
    old = {f.name: getattr(RATES, f.name) for f in fields(Rates)}
    rates = Rates(**{name: replace(rate, value=0.0 if rate.unit == "s" else 1e30) for name, rate in old.items()})
    disk = Rate(1e6, "B/s", "assumption", "test")
    cluster = Cluster("c", 1, 4, 0, 64 * GIB, disk, replace(disk, value=1e30), True, rates.dispatch_threads)
    work = Work("w", tuple(many_experts(20)), "low-rank", 7, 16)
    found = run(work, cluster, rates)
    assert found.outcome.makespan == pytest.approx(work.total("read_bytes") / 1e6)
    assert found.outcome.bottleneck == "node read"
    shared = replace(rates, shared_read=disk)
    on_ray = run(work, ray_cluster(shared, 5), shared)
    assert on_ray.outcome.makespan == pytest.approx(work.total("read_bytes") / 1e6)
    assert on_ray.outcome.bottleneck == "shared read"


@pytest.mark.parametrize("kind", ["dense", "low-rank"])
def test_groups_do_the_same_factoring_and_read_the_base_anew(kind: str) -> None:
    work = Work("w", tuple(many_experts(3)), kind, 10, 16)  # type: ignore[arg-type]
    cluster = one_h200(RATES)
    whole, apart = jobs(work, cluster, RATES), jobs(work, cluster, RATES, group=4)
    assert (len(whole), len(apart)) == (3, 3 * (3 + 1))
    gpu = {name: sum(s.seconds for j in part for s in j.stages if s.station == "gpu")
           for name, part in (("whole", whole), ("apart", apart))}  # fmt: skip
    assert gpu["apart"] == pytest.approx(gpu["whole"])
    assert max(j.memory for j in apart) < max(j.memory for j in whole)
    bases = 0 if kind == "low-rank" else 2  # three groups, three bases instead of one
    read = sum(work.read_bytes(shape, size) for _, shape in work.shapes for size in (4, 4, 2))
    assert read == work.total("read_bytes") + bases * 3 * 2 * 3584 * 2048
    last = [j for j in apart if j.needs]
    assert [len(j.needs) for j in last] == [3, 3, 3]


def test_what_no_memory_holds_is_cut_by_itself() -> None:
    work = Work("w", tuple(llama_70b()[-2:]), "dense", 10, 64)
    found = run(work, this_machine(RATES), RATES)
    assert found.count == 2 * (10 + 1) and found.outcome.peak_memory <= 23.5 * GIB


def test_more_nodes_and_faster_parts_never_take_longer_on_equal_tensors() -> None:
    work = Work("w", tuple(many_experts(64)), "low-rank", 50, 16)
    times = [run(work, ray_cluster(RATES, n), RATES).outcome.makespan for n in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert run(work, ray_cluster(RATES, 2), RATES).outcome == run(work, ray_cluster(RATES, 2), RATES).outcome
    better = replace(RATES, factor_flops=replace(RATES.factor_flops, value=1e12))
    assert run(work, one_h200(better), better).outcome.makespan < run(work, one_h200(RATES), RATES).outcome.makespan


def test_money_is_hours_times_cards_times_price() -> None:
    hour = simulate([job(("cpu", 3600.0))], {"cpu": Station(1)})
    work = Work("w", (), "dense", 2, 4)
    assert Run(work, eight_h200(RATES), hour, 1, 3.5).dollars == pytest.approx(8 * 3.5)
    assert Run(work, ray_cluster(RATES, 5), hour, 1, 2.0).dollars == pytest.approx(10.0)
    assert Run(work, this_machine(RATES), hour, 1, 3.5).dollars == 0.0


# --- rates and pages ----------------------------------------------------------------------------------------------


def test_measuring_replaces_what_was_measured_and_nothing_else() -> None:
    found = measured(side=128, rank=8, size=1 << 16)
    for field in fields(Rates):
        old, new = getattr(RATES, field.name), getattr(found, field.name)
        assert (new.unit, new.source, new.note) == (old.unit, old.source, old.note)
        assert new.value >= 0 if old.source == "measured here" else new == old
    assert {getattr(RATES, f.name).source for f in fields(Rates)} == {
        "measured here", "published", "vendor figure", "assumption"
    }  # fmt: skip
    assert str(RATES.gpu_hour) == "3.5 USD" and str(replace(RATES.hash, value=2.5e9)) == "2.5 GB/s"
    assert str(replace(RATES.record, value=7e-5)) == "70 µs"


def test_the_page_shows_what_the_rates_on_record_give() -> None:
    page = scaling_page.PAGE.read_text()
    for name, text in scaling_page.arithmetic(RATES).items():
        inside = page.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
        assert inside.strip() == text.strip(), f"stale: {name}. Run python -m benchmarks.scheduler --write"


def test_the_page_and_the_figure_are_made_from_runs(tmp_path: Path) -> None:
    work = Work("pool", tuple(many_experts(8)), "low-rank", 20, 16)
    runs = tuple(run(work, ray_cluster(RATES, n), RATES) for n in (1, 2))
    curve = Curve("pool", "nodes", (1, 2), runs)
    page = tmp_path / "page.md"
    names = ("volume", "places", "waits", "policies", "rates")
    page.write_text("".join(f"<!-- {n}: begin -->\n<!-- {n}: end -->\n" for n in names))
    scaling_page.write(RATES, runs, [curve], [("pool", "as it comes", runs[0])], page)
    text = page.read_text()
    assert "| pool | Ray, 1 nodes | Ray, 2 nodes |" in text and "| pool | nodes | " in text and "as it comes" in text
    path = scheduler_figure.draw([curve, replace(curve, axis="vectors")], tmp_path)
    assert path.name == "scheduler.svg" and path.read_text().startswith("<?xml")
