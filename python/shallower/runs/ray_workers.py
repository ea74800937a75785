"""Workers that are actors of a Ray cluster, each on a node that the driver chooses.

A node that comes late gets its share of workers, one that goes takes its own with it, and one that
refuses the work gets no more.
"""

import logging
import os
import re
import socket
import sys
import time
from collections import Counter
from importlib.util import find_spec
from typing import Any

from ..errors import MissingExtraError, ProcessesError, ShallowerError, why
from .units import SECONDS, Engine, Event, Job, Message, Worker

CONNECT_SECONDS = 5.0

STORE_BYTES = 128 << 20
"""Shared memory of a cluster that is started here: all that passes are sums."""

OWN_CLUSTER = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on 127.0.0.1 alone
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as of Ray 2.60; older ones warn that it comes
    "RAY_memory_monitor_refresh_ms": "0",  # files that are mapped would count as taken
}
"""Variables of a cluster that is started here."""

MOST_DEATHS = 3
"""So many workers of a node may end before they are ready."""


class RayWorkers(Engine):
    """Replicas of the model on the nodes of the cluster that ``RAY_ADDRESS`` names, or of one here.

    Raises:
        MissingExtraError: ray is not installed.
        ProcessesError: there is no cluster at the address, or none of its nodes has enough.
    """

    def __init__(self, job: Job, count: int | None, *, gpus: int = 1) -> None:
        if find_spec("ray") is None:
            raise MissingExtraError("ray", "cluster", "--on ray")
        self._job, self._count, self._gpus = job, count, gpus
        self._actors: dict[str, tuple[Any, str]] = {}
        self._waiting: dict[Any, str] = {}
        self._ready: set[str] = set()
        self._deaths: Counter[str] = Counter()
        self._refusals: dict[str, ShallowerError] = {}
        self._started, self._is_ours, self._looked = 0, False, 0.0

    def __enter__(self) -> "RayWorkers":
        if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
            self._join()
            self._is_ours = True
        self._fill()
        if not self._actors:
            self.__exit__()
            raise ProcessesError(
                f"no node of the Ray cluster has {self._needs()} for a worker: start one that has",
                see="cluster",
            )
        return self

    @staticmethod
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
        import ray

        try:
            ray.init(
                address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **more
            )
        except (OSError, RuntimeError, ValueError) as error:
            where = f"at RAY_ADDRESS={address}" if address else "here"
            raise ProcessesError(f"no Ray cluster {where}: {why(error)}", see="cluster") from error

    def __exit__(self, *_: object) -> None:
        import ray

        for actor, _node in self._actors.values():
            ray.kill(actor)
        self._actors, self._waiting = {}, {}
        if self._is_ours:
            ray.shutdown()

    def _needs(self) -> str:
        gpus = f" and {self._gpus} GPU" if self._on_gpus else ""
        return f"{self._job.threads} CPU{gpus}"

    @property
    def _nodes(self) -> dict[str, dict[str, float]]:
        """The resources of the nodes that are alive and take this work, by their id."""
        import ray

        return {
            node["NodeID"]: node["Resources"]
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in self._refusals
        }

    @property
    def _on_gpus(self) -> bool:
        import ray

        on_cpu = self._job.described.get("source", {}).get("device_map") == "cpu"
        return not on_cpu and any(node["Resources"].get("GPU") for node in ray.nodes())

    def _fill(self) -> None:
        """Start as many workers as nodes have room for, and were asked for."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._looked = time.monotonic()
        has = Counter(node for _, node in self._actors.values())
        gpus = self._gpus if self._on_gpus else 0
        for node, resources in self._nodes.items():
            room = int(resources.get("CPU", 0) // self._job.threads)
            if gpus:
                room = min(room, int(resources.get("GPU", 0) // gpus))
            for _ in range(room - has[node]):
                if self._count is not None and len(self._actors) >= self._count:
                    return
                # Restarts and retries are the driver's: it counts what a unit has cost.
                actor = ray.remote(Worker).options(
                    num_cpus=self._job.threads,
                    num_gpus=gpus,
                    max_restarts=0,
                    max_task_retries=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                    runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._job.threads)}},
                )
                self._start(actor.remote(self._job), node)

    def _start(self, actor: Any, node: str) -> None:
        worker = f"worker {self._started} on node {node[:8]}"
        self._started += 1
        self._actors[worker] = actor, node
        self._waiting[actor.open.remote()] = worker

    def give(self, worker: str, unit: str) -> None:
        """Send a unit."""
        self._waiting[self._actors[worker][0].run.remote(unit)] = worker

    def events(self) -> list[Event]:
        """Wait for messages and deaths, and for nodes that came."""
        import ray

        done, _ = ray.wait(list(self._waiting), num_returns=1, timeout=SECONDS)
        found = [self._heard(reference) for reference in done]
        lost = not self._actors or any(one.kind == "lost" for one in found)
        if lost or time.monotonic() - self._looked > SECONDS:
            self._fill()
        if not self._actors:
            none = ProcessesError(f"no node of the Ray cluster has {self._needs()} any more")
            raise next(iter(self._refusals.values()), none)
        return found

    def _heard(self, reference: Any) -> Event:
        import ray
        from ray.exceptions import RayError

        worker = self._waiting.pop(reference)
        try:
            message: Message = ray.get(reference)
        except RayError as error:
            return Event(worker, "lost", self._lose(worker, error))
        if message[0] == "ready":
            self._ready.add(worker)
        return Event(worker, *message)

    def _lose(self, worker: str, error: Exception) -> str:
        """Forget a worker that died; how it ended."""
        _, node = self._actors.pop(worker)
        how = why(error)
        if worker not in self._ready:
            self._deaths[node] += 1
            if self._deaths[node] >= MOST_DEATHS:
                self._refusals[node] = ProcessesError(f"no worker came to work on a node: {how}")
        return how

    def refuse(self, worker: str, error: ShallowerError) -> None:
        """Use no more workers on the node of one that refuses the work."""
        import ray

        actor, node = self._actors.pop(worker)
        ray.kill(actor)
        self._refusals[node] = error
        print(f"{worker} takes no part: {error}", file=sys.stderr, flush=True)


def _check_address(address: str) -> None:
    """Refuse an address where nobody listens, for which Ray would wait for minutes."""
    match = re.fullmatch(r"(?:ray://)?(.+):(\d{1,5})", address)
    if match is None or address.startswith("ray://"):
        raise ProcessesError(
            f"RAY_ADDRESS={address}: expected HOST:PORT of the head of a cluster, from one of its "
            f"nodes",
            see="cluster",
        )
    try:
        socket.create_connection((match[1], int(match[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ProcessesError(
            f"no Ray cluster at RAY_ADDRESS={address}: {why(error)}", see="cluster"
        ) from error
