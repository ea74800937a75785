"""Units shared on a Ray cluster of nodes that come, go and refuse; the tests stay below 120 s."""

import logging
import os
import re
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

import shallower
from shallower.errors import ProcessesError, TextsError
from shallower.sharing.scan_work import ScanWork
from shallower.sharing.share import share
from shallower.studies.scan import ScanJob
from shallower.texts.sources import Texts
from shallower.values.estimates import MemoryPlan
from shallower.workers import ray_workers
from shallower.workers.ray_workers import RayWorkers
from shallower.workers.units import Ledger, drive
from tests.conftest import tiny_llama, write_jsonl
from tests.documents import documents
from tests.workers.counting import done_in, job_of

ray = pytest.importorskip("ray")


def small():
    """The memory that a replica takes which is not known."""
    return MemoryPlan(None, 1, None, 1)


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, and two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_workers.OWN_CLUSTER.items():
            patch.setenv(name, value)
        size = {"object_store_memory": 80 << 20}
        # A node has 30 s to start, which a busy machine may not keep: its clock is slow.
        slow = SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() / 8})
        patch.setattr("ray._private.node.time", slow)
        found = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size}
        )
        for _ in range(2):
            found.add_node(num_cpus=1, **size)
        ray.init(found.address, log_to_driver=False, logging_level=logging.ERROR)
        yield found
        ray.shutdown()
        found.shutdown()


def squares(folder, count=6, *, happens=None, **described):
    """The results that the cluster finds, and the ledger; what happens when so many are there."""
    found, ledger = {}, Ledger(map(str, range(count)))

    def accept(unit, content):
        found[unit] = content
        (happens or {}).get(len(found), lambda: None)()

    engine = RayWorkers(job_of(folder, **described), None, memory=small)
    drive(engine, ledger, accept, ready=lambda _worker, _hello: None)
    return found, ledger


def all_of(count):
    return {str(unit): str(unit**2).encode() for unit in range(count)}


@pytest.mark.usefixtures("cluster")
def test_nodes_share_the_units(tmp_path):
    found, _ = squares(tmp_path, at=2)
    assert found == all_of(6)
    done = done_in(tmp_path)
    assert sorted(unit for unit, _ in done) == [*"012345"]
    assert len({process for _, process in done}) == 2


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_is_replaced(tmp_path):
    found, _ = squares(tmp_path, kills_once="2")
    assert found == all_of(6)
    assert sorted(unit for unit, _ in done_in(tmp_path)) == [*"0122345"]


@pytest.mark.usefixtures("cluster")
def test_nodes_that_refuse_the_work_are_not_asked_again(tmp_path, capfd):
    with pytest.raises(TextsError, match=r"^there are none$"):
        squares(tmp_path, refuses="there are none")
    assert capfd.readouterr().err.count("takes no part: there are none") == 2


@pytest.mark.slow
def test_a_node_that_comes_late_takes_work_and_one_that_goes_gives_it_back(tmp_path, cluster):
    """The node that goes has a unit which waits for ever there, and ends at once elsewhere.

    From the seventh on units wait for the node that comes, however long it takes.
    """

    def come():
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    def go():
        stuck = next(process for unit, process in done_in(tmp_path) if unit == "0")
        cluster.remove_node(node_of(cluster, int(stuck)), allow_graceful=False)

    happens = {3: come, 10: go}
    found, _ = squares(tmp_path, 14, happens=happens, waits_once="0", at=3, since=6)
    assert found == all_of(14)
    done = done_in(tmp_path)
    assert [unit for unit, _ in done].count("0") == 2
    assert len({process for _, process in done}) >= 3


def node_of(cluster, process):
    """The node whose child a worker is."""
    import psutil

    above = {one.pid for one in psutil.Process(process).parents()}
    for node in cluster.list_all_nodes():
        raylets = node.all_processes.get("raylet", [])
        if any(info.process.pid in above for info in raylets):
            return node
    raise AssertionError("it is of no node")


@pytest.fixture
def other_version(tmp_path):
    """A folder of another version of the package, whose code is the same."""
    place = tmp_path / "other"
    shutil.copytree(Path(shallower.__file__).parent, place / "shallower")
    (place / "shallower-0.9.9.dist-info").mkdir()
    (place / "shallower-0.9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: shallower\nVersion: 0.9.9\n"
    )
    return place


@pytest.mark.slow
def test_a_cluster_scans_to_the_bytes_of_one_process(
    tmp_path, words, cluster, other_version, capfd
):
    """Another version on one of its nodes takes no part, and the others do all."""
    node = cluster.add_node(
        num_cpus=1, object_store_memory=80 << 20, env_vars={"PYTHONPATH": str(other_version)}
    )
    tiny_llama().save_pretrained(tmp_path / "tiny")
    words.save_pretrained(tmp_path / "tiny")
    texts = Texts(str(write_jsonl(tmp_path / "texts.jsonl", documents(80))))
    source = shallower.ModelSource(tmp_path / "tiny")
    job = ScanJob(source=source, texts=texts, out=tmp_path / "out", max_length=16, batch_size=1)
    share(ScanWork(job, on="ray"))
    cluster.remove_node(node)
    shallower.scan(*source.load(), texts, max_length=16, batch_size=1).save(tmp_path / "whole")
    assert (tmp_path / "out" / "scan.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()
    said = capfd.readouterr().err
    assert said.count("takes no part: this node has shallower 0.9.9, the driver 0.") == 1


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_no_node_has_room_for_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    with (
        pytest.raises(
            ProcessesError, match=r"no node of the Ray cluster has 64 CPU .*for a worker"
        ),
        RayWorkers(job_of(tmp_path), None, memory=small),
    ):
        pass


@pytest.mark.usefixtures("cluster")
def test_who_waits_for_room_says_until_when(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ray_workers, "SAID_SECONDS", 1.0)
    monkeypatch.setattr(ray_workers, "ROOM_SECONDS", 3.0)

    @ray.remote(num_cpus=1)
    class Other:
        def here(self):
            return True

    others = [Other.remote() for _ in range(2)]
    ray.get([other.here.remote() for other in others])
    try:
        with pytest.raises(ProcessesError, match=r"and 0 of 2 are free after \d s"):
            squares(tmp_path)
    finally:
        for other in others:
            ray.kill(other)
    said = capfd.readouterr().err
    assert re.search(r"each takes 1 CPU, and 0 of 2 are free; waiting until \d\d:\d\d:\d\d", said)


def test_where_something_else_listens_is_no_cluster(tmp_path, monkeypatch):
    """A server that says nothing, or something else."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_workers, "CONNECT_SECONDS", 0.5)
    for answer, said in (
        (b"HTTP/1.1 400 Bad Request", "something else listens"),
        (b"", "timed out"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
            talk = Thread(target=lambda server=server, answer=answer: held(server, answer))
            talk.start()
            with pytest.raises(ProcessesError, match=said):
                RayWorkers(job_of(tmp_path), None, memory=small).__enter__()
            talk.join()


def held(server, answer):
    """Answer the first who comes, and wait until it goes."""
    connection, _ = server.accept()
    with connection, suppress(OSError):
        connection.sendall(answer)
        while connection.recv(64):
            pass


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "no Ray cluster at RAY_ADDRESS=127.0.0.1:9: connection refused"),
        ("ray://127.0.0.1:10001", "expected HOST:PORT of the head of a cluster"),
        ("somewhere", "expected HOST:PORT of the head of a cluster"),
    ],
)
def test_an_address_where_no_cluster_is_is_refused_at_once(tmp_path, monkeypatch, address, said):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    began = time.monotonic()
    with (
        pytest.raises(ProcessesError, match=said),
        RayWorkers(job_of(tmp_path), None, memory=small),
    ):
        pass
    assert time.monotonic() - began < 10
    assert os.environ["RAY_ADDRESS"] == address


def test_a_cluster_that_does_not_start_in_time_is_no_traceback(tmp_path, monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in ray_workers.OWN_CLUSTER.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessesError, match="no Ray cluster here: The current node timed out"):
        RayWorkers(job_of(tmp_path), None, memory=small).__enter__()


@pytest.mark.parametrize(
    ("given", "mode"), [({}, "token"), ({"RAY_AUTH_MODE": "disabled"}, "disabled")]
)
def test_a_cluster_of_our_own_asks_for_a_token(tmp_path, monkeypatch, given, mode):
    """Ray 2.52 would take code from every user of the machine otherwise."""
    (tmp_path / "ray.py").write_text(
        "import os\n\ndef init(**_): pass\n\nFOUND = dict(os.environ)\n"
    )
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", *ray_workers.OWN_CLUSTER):
        monkeypatch.setenv(name, "")  # and so as it was, behind the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.syspath_prepend(tmp_path)
    ray_workers._join()
    assert sys.modules["ray"].FOUND["RAY_AUTH_MODE"] == mode
