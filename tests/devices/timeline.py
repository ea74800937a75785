"""The order in which the host and the streams of fake CUDA devices do their work.

Each knows how far the others are from events and from what blocks alone (vector clocks). Whoever
touches memory without knowing that it is written, or read to the end, is refused as soon as that
is seen, and so is memory that is given back while another stream still uses it: torch would hand it
out anew, in the order of the stream that it was made on.
"""

import functools
import weakref
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

HOST = "the host"


class OrderError(RuntimeError):
    """What CUDA would do too early, on a device or beside it."""


@dataclass(frozen=True)
class _Access:
    """Who touched the bytes ``start`` to ``stop`` of a storage, and when by its own clock."""

    actor: str
    time: int
    start: int
    stop: int
    writes: bool


@dataclass
class _Memory:
    """A storage, by the stream that it was made on, and what its bytes are in use for."""

    made_on: str
    accesses: list = field(default_factory=list)
    end: weakref.ref = None


@dataclass(frozen=True)
class Copy:
    """A copy between the CPU and a device."""

    num_bytes: int
    stream: str
    blocks: bool
    to_device: bool


class Timeline:
    """Clocks of the host and of all streams, and what each has touched.

    Attributes:
        log: copies between the CPU and a device, and what a test adds.
        peaks: how many storages of a number of bytes the devices have held at once.
        early: what was given back while it was in use.
    """

    def __init__(self):
        self.clocks = defaultdict(Counter)
        self.memory, self.pinned = {}, set()
        self.log, self.early = [], []
        self.inside, self.num_streams = [], 0
        self.live, self.peaks = Counter(), Counter()
        self.Event = type("Event", (_Event,), {"timeline": self})
        self.Stream = type("Stream", (_Stream,), {"timeline": self})

    # What stands for torch.cuda.
    def current_stream(self, device=None):
        at = [stream for stream in self.inside if stream.name.endswith(_name(device))]
        return at[-1] if at else self.Stream(name=f"computing of {_name(device)}")

    @contextmanager
    def within(self, stream):
        self.inside.append(stream)
        try:
            yield
        finally:
            self.inside.pop()

    # What is done.
    def knows(self, actor, clock):
        """Let an actor know what another knew."""
        mine = self.clocks[actor]
        for other, time in clock.items():
            if mine[other] < time:
                mine[other] = time

    def wait_for(self, device):
        """Let the host wait for what computes on a device."""
        self.knows(HOST, self.clocks[self.current_stream(device).name])

    def pin(self, tensor):
        self.pinned.add(_key(tensor))
        return tensor

    def saw(self, function, args, kwargs, output):
        """Take note of an operation, whose tensors it read or wrote."""
        names, written = arguments(function)
        if not written and args and _are_one(output, args[0]):
            return  # a view
        named = dict(zip(names, args, strict=False)) | kwargs
        writes = [tensor for name in written for tensor in _tensors(named.pop(name, None))]
        reads = [tensor for value in named.values() for tensor in _tensors(value)]
        if function.overloadpacket.__name__.endswith("_like"):
            reads = []  # but their shapes
        given = set(map(_key, (*reads, *writes)))
        made = [tensor for tensor in _tensors(output) if _key(tensor) not in given]
        if not made and not writes:
            return  # a view, or what is known without values
        cards = {tensor.device for tensor in (*reads, *writes, *made) if is_on_card(tensor)}
        actors = [self.current_stream(card).name for card in cards] or [HOST]
        for other in (*actors[1:], HOST):  # what spans two devices waits for both
            self.knows(actors[0], self.clocks[other])
        actor = actors[0]
        self.clocks[actor][actor] += 1
        for tensor in made:
            self._make(tensor)
        for tensor in reads:
            self._touch(tensor, actor, writes=False)
        for tensor in (*writes, *made):
            self._touch(tensor, actor, writes=True)
        for other in actors[1:]:
            self.knows(other, self.clocks[actor])
        if actor != HOST:
            self._cross(actor, reads, (*writes, *made)[0], named)

    def _cross(self, actor, reads, target, named):
        """A copy between the CPU and a device blocks unless it need not."""
        to_device = is_on_card(target)
        source = next((one for one in reads if is_on_card(one) != to_device), None)
        if source is None or (to_device and source.ndim == 0):  # a number
            return
        on_cpu = source if to_device else target
        blocks = not (named.get("non_blocking") and _key(on_cpu) in self.pinned)
        if blocks:
            self.knows(HOST, self.clocks[actor])
        size = target.numel() * target.element_size()
        self.log.append(Copy(size, actor, blocks, to_device))

    def host_reads(self, tensor):
        self._touch(tensor, HOST, writes=False)

    def _make(self, tensor):
        key, storage = _key(tensor), tensor.untyped_storage()
        on_card = is_on_card(tensor)
        stream = self.current_stream(tensor.device).name if on_card else HOST
        size = storage.nbytes()
        before = _Access(stream, self.clocks[stream][stream], 0, size, writes=True)
        end = weakref.ref(storage, lambda _: self._give_back(key, size))
        self.memory[key] = _Memory(stream, [before], end)  # by whatever lay there
        self.live[size] += on_card
        self.peaks[size] = max(self.peaks[size], self.live[size])

    def _touch(self, tensor, actor, *, writes):
        memory = self.memory.get(_key(tensor))
        if memory is None or not tensor.numel():  # from before
            return
        start = tensor.storage_offset()
        extent = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
        start, stop = (place * tensor.element_size() for place in (start, start + extent + 1))
        kept = []
        for one in memory.accesses:
            meets = one.start < stop and start < one.stop and (writes or one.writes)
            if meets and one.actor != actor and self.clocks[actor][one.actor] < one.time:
                raise OrderError(
                    f"{actor} {'writes' if writes else 'reads'} {tuple(tensor.shape)} on device "
                    f"{tensor.device} and has not waited for {one.actor}"
                )
            within = start <= one.start and one.stop <= stop
            if not within or not (writes or (one.actor == actor and not one.writes)):
                kept.append(one)
        kept.append(_Access(actor, self.clocks[actor][actor], start, stop, writes))
        memory.accesses = kept

    def _give_back(self, key, size):
        memory = self.memory.pop(key)
        self.pinned.discard(key)
        if memory.made_on == HOST:  # which torch keeps until it has been sent
            return
        self.live[size] -= 1
        clocks = self.clocks[memory.made_on], self.clocks[HOST]
        for one in memory.accesses:
            known = max(clock[one.actor] for clock in clocks)
            if one.actor != memory.made_on and known < one.time:
                self.early.append(f"{size:,} bytes of {memory.made_on} that {one.actor} uses")


class _Event:
    """Stands for an event of CUDA."""

    def __init__(self, *_args, **_options):
        self.clock = Counter()

    def record(self, stream=None):
        stream = stream or self.timeline.current_stream()
        self.clock = self.timeline.clocks[stream.name] | self.timeline.clocks[HOST]

    def wait(self, stream=None):
        self.timeline.knows((stream or self.timeline.current_stream()).name, self.clock)

    def query(self):
        return True

    def synchronize(self):
        self.timeline.knows(HOST, self.clock)


class _Stream:
    """Stands for a stream of CUDA."""

    def __init__(self, device=None, *_args, name=None, **_options):
        self.timeline.num_streams += name is None
        self.name = name or f"stream {self.timeline.num_streams} of {_name(device)}"

    def wait_stream(self, stream):
        self.timeline.knows(self.name, self.timeline.clocks[stream.name])

    def wait_event(self, event):
        event.wait(self)

    def record_event(self, event=None):
        event = event or self.timeline.Event()
        event.record(self)
        return event

    def synchronize(self):
        self.timeline.knows(HOST, self.timeline.clocks[self.name])


def _name(device):
    device = torch.device("cuda", 0) if device is None else torch.device(device)
    return f"cuda:{device.index or 0}"


def is_on_card(tensor):
    """Whether a tensor is on a device; ``is_cuda`` asks torch's modes for it."""
    return tensor.device.type == "cuda"


def _key(tensor):
    return tensor.untyped_storage()._cdata


def _are_one(one, other):
    """Whether both are tensors of one storage."""
    both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return both and (one is other or _key(one) == _key(other))


def _tensors(value):
    values = value if isinstance(value, list | tuple) else (value,)
    return [one for one in values if isinstance(one, torch.Tensor) and one.device.type != "meta"]


@functools.cache
def arguments(function):
    """The names of the arguments of an operation, and of those that it writes to."""
    arguments = function._schema.arguments
    written = [one.name for one in arguments if one.alias_info and one.alias_info.is_write]
    return [one.name for one in arguments], written
