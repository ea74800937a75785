"""States on their way to the CPU; states, weights and token ids on theirs to the device.

On CUDA they travel on streams of their own through pinned memory, while the model computes.
:class:`SideStreams` makes all calls to CUDA.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Gathered:
    """Rows of the states that are on one device in one dtype."""

    rows: torch.Tensor  # (room, N, D), filled from the front
    states: list[int]  # of which they are, by place in `rows`

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbours in ``rows`` that are neighbouring states: place, state and length."""
        found: list[tuple[int, int, int]] = []
        for place, state in enumerate(self.states):
            if found and state == sum(found[-1][1:]):
                found[-1] = (*found[-1][:2], found[-1][2] + 1)
            else:
                found.append((place, state, 1))
        return found


@dataclass(frozen=True, slots=True)
class Upload:
    """A copy to a CUDA device: where the device had to be for it, and its end."""

    device: torch.device
    begun: torch.cuda.Event
    copied: torch.cuda.Event


class SideStreams:
    """A stream on each device beside the computing one; all calls to CUDA are here, to be faked."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def pin(self, num_bytes: int) -> torch.Tensor:
        """Allocate pinned memory, as a tensor of bytes."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def send(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Send a tensor to a CUDA device through pinned memory, ahead of the work queued after it.

        PyTorch keeps the pinned copy until it has been sent.
        """
        return tensor.pin_memory().to(device, non_blocking=True)

    def receive(self, rows: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Copy rows off a CUDA device, once they are computed, while it computes what comes next.

        The caller keeps ``rows`` until the copy has ended: only then may the device use their
        memory for something else. ``target`` is pinned memory of their shape, which is not used
        otherwise until then.
        """
        device = rows.device
        side = self._beside(device)
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(device))
        side.wait_event(computed)
        with torch.cuda.stream(side):
            target.copy_(rows, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(side)
        return copied

    def begin(self, device: torch.device) -> Upload:
        """Begin a copy to a CUDA device, into tensors that were just made there.

        What is queued on the device may still use their memory.
        """
        begun = torch.cuda.Event()
        begun.record(torch.cuda.current_stream(device))
        return Upload(device, begun, torch.cuda.Event())

    def bring(self, upload: Upload, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy tensors of the CPU into targets while the device computes, by any thread.

        PyTorch keeps the pinned copies until they are sent; the caller keeps the targets until
        :meth:`arrive`, as only then the device may reuse their memory.
        """
        side = self._beside(upload.device)
        side.wait_event(upload.begun)
        try:
            with torch.cuda.stream(side):
                for source, target in pairs:
                    target.copy_(source.pin_memory(), non_blocking=True)
        finally:
            upload.copied.record(side)

    def arrive(self, upload: Upload) -> None:
        """Let all that is queued on the device from now on begin after the end of a copy."""
        torch.cuda.current_stream(upload.device).wait_event(upload.copied)

    def _beside(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class HostCopies:
    """Copies of states to the CPU, at most two at a time, and to a device, one ahead of its use."""

    def __init__(self, streams: SideStreams | None = None) -> None:
        self._streams = streams or SideStreams()
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._largest = 0

    def send(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Send a tensor on the CPU to a device of any kind, beside its computing if it can."""
        return self._streams.send(tensor, device) if is_apart(device) else tensor.to(device)

    def bring(
        self, tensors: Iterable[torch.Tensor], device: torch.device
    ) -> Iterator[torch.Tensor]:
        """Give tensors on a device; on CUDA each comes while that before it is worked on."""
        if not is_apart(device):
            yield from tensors
            return
        coming: deque[tuple[torch.Tensor, Upload]] = deque()
        try:
            for tensor in tensors:
                target = torch.empty_like(tensor, device=device)
                coming.append((target, self._streams.begin(device)))
                self._streams.bring(coming[-1][1], [(tensor, target)])
                if len(coming) > 1:
                    yield self._arrived(*coming.popleft())
            while coming:
                yield self._arrived(*coming.popleft())
        finally:
            while coming:  # what is not needed any more
                self._arrived(*coming.popleft())

    def _arrived(self, target: torch.Tensor, upload: Upload) -> torch.Tensor:
        self._streams.arrive(upload)
        return target

    def start(self, gathered: list[Gathered]) -> Callable[[], torch.Tensor]:
        """Start the copy of all states of a batch; the gathered rows must have no other owner.

        Returns what waits for the (L+1, N, D) states on the CPU, and frees the memory that they
        take on the devices. On CUDA they may be overwritten once the copy after the next is
        started.

        On CUDA it takes the buffer of the copy before the last one, whose reader must be done by
        then: :func:`stream` starts the copy of a batch when its consumer has requested the part
        before, and so is done with the one before that.
        """
        shape = sum(len(one.states) for one in gathered), *gathered[0].rows.shape[1:]
        dtype = gathered[0].rows.dtype
        for one in gathered[1:]:
            dtype = torch.promote_types(dtype, one.rows.dtype)
        apart = any(is_apart(one.rows.device) for one in gathered)
        if not apart and len(gathered) == 1 and gathered[0].runs == [(0, 0, shape[0])]:
            there = gathered[0].rows.cpu()
            return lambda: there
        states = self._buffer(shape, dtype) if apart else torch.empty(shape, dtype=dtype)
        events = []
        for one in gathered:
            for place, state, length in one.runs:
                rows, target = one.rows[place : place + length], states[state : state + length]
                if is_apart(rows.device):
                    events.append(self._streams.receive(rows, target))
                else:
                    target.copy_(rows)

        def wait() -> torch.Tensor:
            for event in events:
                event.synchronize()
            gathered.clear()  # they must stay until then
            return states

        return wait

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The states' part of the pinned buffer whose turn it is, no smaller than any so far."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        self._largest = max(self._largest, num_bytes)
        buffer, other = self._buffers
        if buffer is None or buffer.numel() < num_bytes:
            self._buffers[0] = buffer = None  # give back the smaller one before asking for more
            buffer = self._streams.pin(self._largest)
        self._buffers = [other, buffer]
        return buffer[:num_bytes].view(dtype).view(shape)


def is_apart(device: torch.device) -> bool:
    """Whether copies to a device, and from it, go on while it computes."""
    return device.type == "cuda"
