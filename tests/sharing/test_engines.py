"""What each worker gets: workers, threads and GPUs, by what this process may use and nodes have."""

import os

import pytest

from shallower import processes
from shallower.errors import ProcessesError
from shallower.memory import device
from shallower.sharing import engines
from shallower.sharing.engines import seats
from shallower.values.estimates import MemoryPlan
from shallower.workers.local_workers import LocalWorkers, Seat
from shallower.workers.ray_workers import threads_of
from shallower.workers.units import Ledger, drive
from tests.conftest import tiny_llama
from tests.workers.counting import job_of

GB = 10**9


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of so many processors and GPUs, on which nothing else is said."""

    def made(cpus, cards=0, free=64 * GB, **variables):
        for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(processes, "_CGROUPS", tmp_path)
        monkeypatch.setattr(processes, "_OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(os, "cpu_count", lambda: 128)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
        monkeypatch.setattr(device, "num_cards", lambda: cards)
        monkeypatch.setattr(device, "available_bytes", lambda _: free)

    return made


def needs(peak, room=80 * GB):
    """A forecast of what a replica takes of a GPU of 80 GB, or of this machine."""
    return lambda: MemoryPlan(peak, 1, None, room)


@pytest.mark.parametrize(
    ("cpus", "cards", "workers", "peak", "expected"),
    [
        (8, 0, None, GB, [(8, None)]),
        (8, 0, 2, GB, [(4, None)] * 2),
        (32, 2, None, GB, [(16, "0"), (16, "1")]),
        (128, 8, 2, GB, [(64, "0"), (64, "1")]),
        (16, 2, 4, GB, [(4, "0"), (4, "1"), (4, "0"), (4, "1")]),
        (128, 8, None, 140 * GB, [(32, f"{card},{card + 1}") for card in range(0, 8, 2)]),
        (128, 2, None, 900 * GB, [(128, "0,1")]),
        (128, 8, None, None, [(16, str(card)) for card in range(8)]),
    ],
)
def test_the_table_of_what_each_gets(machine, cpus, cards, workers, peak, expected):
    machine(cpus, cards)
    found = seats(None, workers, needs(peak))
    assert found == [Seat(threads, names) for threads, names in expected]


def test_variables_and_places_of_the_user_hold(machine):
    machine(8, 2, CUDA_VISIBLE_DEVICES="GPU-a, GPU-b", OMP_NUM_THREADS="3")
    assert seats("auto", None, needs(GB)) == [Seat(3, "GPU-a"), Seat(3, "GPU-b")]
    for place in ("cpu", "cuda:1", {"": 1}):
        assert seats(place, 2, needs(GB)) == [Seat(3)] * 2
    for threads in ("0", "", "all"):
        machine(8, OMP_NUM_THREADS=threads)
        assert seats(None, 2, needs(GB)) == [Seat(4)] * 2


@pytest.mark.parametrize(
    ("cards", "workers", "peak", "most"),
    [
        (0, 200, 10**8, 95),
        (0, 6, 12 * GB, 4),
        (8, 5, 140 * GB, 4),
        (1, 200, GB, 49),
    ],
)
def test_more_than_there_is_memory_for_are_refused_with_what_they_weigh(
    machine, cards, workers, peak, most
):
    machine(64, cards)
    with pytest.raises(ProcessesError, match=r"workers take .* GB of memory, .* each") as refused:
        seats(None, workers, needs(peak))
    assert f"expected at most {most} (workers, --workers)" in str(refused.value)
    assert len(seats(None, most, needs(peak))) == most


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({}, "0::/", 8),
        ({"cpu.max": "max 100000"}, "0::/", 8),
        ({"cpu.max": "300000 100000"}, "0::/", 3),
        ({"slurm/cpu.max": "200000 100000"}, "0::/slurm/job_1", 2),
        (
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
            "3:cpu:/docker/a",
            4,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", 8),
    ],
)
def test_a_cpuset_and_a_quota_count(machine, tmp_path, files, own, expected):
    machine(8)
    (tmp_path / "own").write_text(f"{own}\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert processes.processors() == expected
    assert seats(None, 2, needs(GB)) == [Seat(max(1, expected // 2))] * 2


def test_the_limit_of_an_older_container_counts(machine, tmp_path):
    machine(8)
    (tmp_path / "own").write_text("4:memory:/docker/a\n")
    folder = tmp_path / "memory"
    folder.mkdir()
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "500")):
        (folder / f"memory.{name}").write_text(text)
    (folder / "memory.stat").write_text("total_cache 9\ntotal_inactive_file 200\n")
    assert processes.memory_limits() == [(900, 600)]
    (folder / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert processes.memory_limits() == []


@pytest.mark.parametrize(
    ("nodes", "count", "expected"),
    [
        ([(1, 1)], None, 1),  # a node of one CPU, beside a driver of any number
        ([(0, 1), (1, 1)], None, 1),  # a head that does no work
        ([(16, 1), (16, 1)], 8, 4),
        ([(1, 1), (2, 1)], 2, 1),
        ([(2, 1)], 200, 1),
        ([(128, 8)], None, 16),  # GPUs
        ([(128, 8), (8, 2), (64, 0)], None, 4),
        ([(4, 8)], None, 1),
    ],
)
def test_threads_on_a_cluster_are_those_that_every_node_has(nodes, count, expected):
    assert threads_of(nodes, count) == expected


def test_processes_see_their_own_threads_and_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    engine = LocalWorkers(job_of(tmp_path, shows=True, at=2), [Seat(2, "0,1"), Seat(3, "2")])
    found = {}
    drive(engine, Ledger(["0", "1"]), found.__setitem__, ready=lambda *_: None)
    assert {*found.values()} == {b"2 threads, GPUs 0,1", b"3 threads, GPUs 2"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_machine_with_gpus_needs_no_number_of_workers(machine, tmp_path):
    from shallower.models.source import ModelSource
    from shallower.sharing.scan_work import ScanWork
    from shallower.studies.scan import ScanJob
    from shallower.texts.sources import Texts

    (tmp_path / "texts.txt").write_text("w1 w2")
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)

    def work(**how):
        texts, out = Texts(str(tmp_path / "texts.txt")), tmp_path / "out"
        return ScanWork(ScanJob(source=ModelSource(model, **how), texts=texts, out=out))

    machine(8, 2)
    assert engines.cards_for(None) == ["0", "1"]
    work()
    with pytest.raises(ProcessesError, match="how many processes"):
        work(device_map="cpu")
