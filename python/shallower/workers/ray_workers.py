"""Workers that are actors of a Ray cluster; a lost one is found here, ``units.py`` acts on it.

Each is on a node that the driver chooses.

Nodes come and go with their workers; one that refuses the work gets no more.
"""

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from importlib.util import find_spec
from typing import Any

from ..errors import MissingExtraError, ProcessesError, ShallowerError, why
from ..processes import processors, requested_threads
from ..values.estimates import MemoryPlan, needed_device
from .units import SECONDS, Engine, Event, Job, Message, Worker

CONNECT_SECONDS = 5.0
"""How long a head may take to answer."""

SAID_SECONDS, ROOM_SECONDS = 10.0, 600.0
"""How long the first worker may wait for its place before that is said, and at all."""

HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of a head begins; the head answers with settings of its own, a frame of type 4."""

STORE_BYTES = 128 << 20
"""Shared memory of a cluster that is started here: all that passes are sums."""

OWN_CLUSTER = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on 127.0.0.1 alone
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as of Ray 2.60; older ones warn that it comes
    "RAY_memory_monitor_refresh_ms": "0",  # files that are mapped would count as taken
}
"""Variables of a cluster that is started here."""


class RayWorkers(Engine):
    """Replicas of the model on the nodes of the cluster at ``RAY_ADDRESS``, or of one here.

    MissingExtraError without ray, ProcessesError for no cluster or no node large enough.
    """

    def __init__(
        self, job: Job, count: int | None, *, gpus: int = 1, memory: Callable[[], MemoryPlan]
    ) -> None:
        if find_spec("ray") is None:
            raise MissingExtraError("ray", "cluster", "--on ray")
        super().__init__(job, count)
        self._memory = memory
        self._needs = {"CPU": 1, "GPU": gpus}
        self._actors: dict[str, Any] = {}
        self._waiting: dict[Any, str] = {}
        self._unplaced: list[Any] = []
        self._nodes: dict[str, dict[str, float]] = {}
        self._is_ours, self._looked, self._entered, self._is_waiting = False, 0.0, 0.0, False

    def __enter__(self) -> "Engine":
        if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
            _join()
            self._is_ours = True
        self._entered = time.monotonic()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        import ray

        super().__exit__()
        if self._is_ours:
            ray.shutdown()

    def room(self) -> dict[str, int]:
        """How many workers each node that is alive has room for."""
        import ray

        if not self.places or time.monotonic() - self._looked > SECONDS:
            self._looked = time.monotonic()
            self._nodes = {one["NodeID"]: one["Resources"] for one in ray.nodes() if one["Alive"]}
            if not self._begun:
                self._decide()
        return {
            node: min(int(has.get(name, 0) // size) for name, size in self._needs.items())
            for node, has in self._nodes.items()
        }

    def _decide(self) -> None:
        """Decide what a worker takes, by what the nodes have that are there at the beginning."""
        nodes = list(self._nodes.values())
        if self.job.device_map == "cpu" or not any(node.get("GPU") for node in nodes):
            del self._needs["GPU"]
            self._needs["memory"] = needed_device(self._memory().peak_bytes or 0)
        shares = [
            (int(node.get("CPU", 0)), int(node.get("GPU", 0) // self._needs["GPU"]))
            if "GPU" in self._needs
            else (int(node.get("CPU", 0)), 1)
            for node in nodes
        ]
        self._needs["CPU"] = requested_threads() or threads_of(shares, self.count)

    @property
    def nobody(self) -> ShallowerError:
        """Say what no node has."""
        units = {"memory": " bytes of memory"}
        needs = " and ".join(
            f"{n:,}{units.get(name, ' ' + name)}" for name, n in self._needs.items()
        )
        has = ", ".join(f"{int(node.get('CPU', 0))} CPU" for node in self._nodes.values())
        return ProcessesError(
            f"no node of the Ray cluster has {needs} for a worker (they have {has or 'nothing'}): "
            f"start one that has",
            see="cluster",
        )

    def start(self, place: str, number: int) -> str:
        """Start an actor on a node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        threads, worker = self._needs["CPU"], f"worker {number} on node {place[:8]}"
        # Restarts and retries are the driver's: it counts what a unit has cost.
        of = ray.remote(Worker).options(
            num_cpus=threads,
            num_gpus=self._needs.get("GPU", 0),
            memory=self._needs.get("memory"),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place, soft=False),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        actor: Any = of.remote(self.job)
        self._actors[worker] = actor
        self._unplaced.append(actor.__ray_ready__.remote())
        self._waiting[actor.open.remote()] = worker
        return worker

    def kill(self, worker: str) -> None:
        """End an actor; what it says from now on is not heard."""
        import ray

        ray.kill(self._actors.pop(worker))
        self._waiting = {one: of for one, of in self._waiting.items() if of != worker}

    def give(self, worker: str, unit: str) -> None:
        """Send a unit."""
        self._waiting[self._actors[worker].run.remote(unit)] = worker

    def events(self) -> list[Event]:
        """Wait for messages and deaths."""
        import ray

        if not self._waiting:
            time.sleep(SECONDS)
            return []
        done, _ = ray.wait(list(self._waiting), num_returns=1, timeout=SECONDS)
        self._look_for_room(bool(done))
        return [self._event_of(reference) for reference in done]

    def _look_for_room(self, is_placed: bool) -> None:
        """Say that no worker has a place yet, and wait for one no longer than is said."""
        import ray

        if not self._unplaced:
            return
        if is_placed or ray.wait(self._unplaced, num_returns=1, timeout=0)[0]:
            self._unplaced.clear()
            return
        waited, free = time.monotonic() - self._entered, ray.available_resources().get("CPU", 0)
        where = (
            f"no worker has started on the Ray cluster: each takes {self._needs['CPU']} CPU, and "
            f"{free:g} of {sum(node.get('CPU', 0) for node in self._nodes.values()):g} are free"
        )
        if waited > ROOM_SECONDS:
            raise ProcessesError(f"{where} after {waited:.0f} s", see="cluster")
        if waited > SAID_SECONDS and not self._is_waiting:
            self._is_waiting = True
            until = datetime.now() + timedelta(seconds=ROOM_SECONDS - waited)
            print(f"{where}; waiting until {until:%H:%M:%S}", file=sys.stderr, flush=True)

    def _event_of(self, reference: Any) -> Event:
        import ray
        from ray.exceptions import RayError

        worker = self._waiting.pop(reference)
        try:
            message: Message = ray.get(reference)
        except RayError as error:
            self._looked = 0.0  # its node may be gone
            return Event(worker, "lost", why(error))
        return Event(worker, *message)


def threads_of(nodes: Sequence[tuple[int, int]], count: int | None) -> int:
    """The threads of every worker: what the smallest node can give each of its shares.

    For a given number of workers on CPUs, what all of them can have.
    """
    found = [cpus // shares for cpus, shares in nodes if shares and cpus >= shares]
    if count is None or any(shares > 1 for _, shares in nodes):
        return min(found, default=1)
    most = range(max(found, default=1), 0, -1)
    return next((n for n in most if sum(cpus // n for cpus, _ in nodes) >= count), 1)


def _join() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start one of this machine alone."""
    address = os.environ.get("RAY_ADDRESS")
    more: dict[str, Any] = {}
    if address:
        _check_address(address)
    else:
        for name, value in OWN_CLUSTER.items():
            os.environ.setdefault(name, value)
        if "ray" not in sys.modules:  # it reads the mode when it is imported
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        more = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        more["num_cpus"] = processors()
    import ray

    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **more
        )
    except Exception as error:  # Ray raises no narrower one where a node does not start in time
        where = f"at RAY_ADDRESS={address}" if address else "here"
        raise ProcessesError(f"no Ray cluster {where}: {why(error)}", see="cluster") from error


def _check_address(address: str) -> None:
    """Refuse an address where no cluster answers, for which Ray would wait for minutes."""
    match = re.fullmatch(r"(?:ray://)?(.+):(\d{1,5})", address)
    if match is None or address.startswith("ray://"):
        raise ProcessesError(
            f"RAY_ADDRESS={address}: expected HOST:PORT of the head of a cluster, from one of its "
            f"nodes",
            see="cluster",
        )
    try:
        with socket.create_connection((match[1], int(match[2])), CONNECT_SECONDS) as connection:
            connection.sendall(HTTP2)
            is_head = os.environ.get("RAY_USE_TLS", "0") != "0" or connection.recv(9)[3:4] == b"\4"
    except (OSError, OverflowError) as error:
        raise ProcessesError(
            f"no Ray cluster at RAY_ADDRESS={address}: {why(error)}", see="cluster"
        ) from error
    if not is_head:
        raise ProcessesError(
            f"no Ray cluster at RAY_ADDRESS={address}: something else listens there", see="cluster"
        )
