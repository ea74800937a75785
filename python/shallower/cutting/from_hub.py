"""A model of the hub, cut by the ranges of its files of weights that stay.

Each weight file is replaced by a sparse file of the same length and header. A cut is planned by
these as by a local folder; then the ranges that it copies are fetched into them. They lie among the
hub's assets, one folder a cut, with a journal of what was fetched, so that the same cut resumes
there. A reply must have the place, length and etag of its request. The hub's SHA-256 is of a whole
file: what is fetched in part is as good as its server.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from functools import partial
from glob import escape
from hashlib import sha256
from pathlib import Path
from threading import Event, Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants

from ..errors import ModelError, OutputError, ShallowerError, raise_output_error, why
from ..models.place import CONFIG_FILE, read_json
from ..progress import BytesProgress, say, say_goes_on, track, track_copy
from ..storage import free_bytes, write_file
from ..texts.hub import (
    etag_of,
    hub_absence,
    hub_files,
    hub_refusal,
    raise_fetch_error,
    warn_of_mirror,
)
from ..texts.quiet import hushed
from ..values.estimates import format_size
from ..values.provenance import hash_of
from .checkpoint import PreparedCut
from .checkpoint_files import INDEX_FILE, SINGLE_FILE, Piece, is_beside, stored_dtype
from .source import MAX_CARRIED_BYTES, MODULES_FILE, hub_id, module_folders

if TYPE_CHECKING:
    from .request import Request

CONNECTIONS = 4

REQUEST_BYTES = 256 << 20
"""Of a request at most."""

JOURNAL_BYTES = 16 << 20
"""What a process that is killed fetches again at most, of each connection."""

TRIES = 5
"""How often a connection may break off without a byte more."""

UNVERIFIED: dict[tuple[str, str], dict[str, str]] = {}
"""By name and commit, the SHA-256 of what this process has fetched of each file, if not all."""

Range = tuple[int, int]

_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 20
_JOURNAL = ".fetched.jsonl"


class HubCheckpoint:
    """A model of the hub at a commit, and the folder that stands for it here.

    ``folder`` is the snapshot in the hub's cache where that is whole; else the one of sparse files,
    whose ``sizes`` in bytes and ``etags`` are by name. ``goes_on``: an earlier call has fetched
    some of it.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        sizes: Mapping[str, int],
        *,
        etags: Mapping[str, str] = MappingProxyType({}),
        show: bool | None = None,
    ) -> None:
        self.name, self.folder, self.sizes, self.etags = name, folder, sizes, etags
        self._show = show
        self._lock, self._stop = Lock(), Event()
        self._come: dict[str, list[Range]] = {name: [] for name in sizes}
        self.goes_on = False

    def missing(self, pieces: Iterable[Piece]) -> list[tuple[str, int, int]]:
        """The ranges of files that have not come yet, neighbours as one."""
        if not self.sizes:
            return []
        wanted: dict[str, list[Range]] = {}
        for path, start, stop in pieces:
            wanted.setdefault(path.name, []).append((start, stop))
        return [
            (name, *gap)
            for name, ranges in sorted(wanted.items())
            for gap in _without(_merged(ranges), _merged(self._come[name]))
        ]

    def missing_bytes(self, pieces: Iterable[Piece]) -> int:
        """Count the bytes that have not come yet."""
        return sum(stop - start for _, start, stop in self.missing(pieces))

    def fetch(self, pieces: Iterable[Piece], report: Callable[[int], object] | None = None) -> None:
        """Fetch what has not come yet; ``report`` receives the bytes of this call so far."""
        ranges = [
            (name, start, min(start + REQUEST_BYTES, stop))
            for name, first, stop in self.missing(pieces)
            for start in range(first, stop, REQUEST_BYTES)
        ]
        if not ranges:
            return
        total = 0

        def come(count: int) -> None:
            nonlocal total
            with self._lock:
                total += count
                if report is not None:
                    report(total)

        what = f"fetch headers and norms of {self.name}"
        self._stop.clear()
        try:
            with (
                track(what, show=self._show) if report is None else nullcontext(),
                hushed(),
                ThreadPoolExecutor(CONNECTIONS) as pool,
            ):
                running = [pool.submit(self._get, *one, come=come) for one in ranges]
                try:
                    for one in as_completed(running):
                        one.result()
                except BaseException:
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for name in {name for name, _, _ in ranges}:
                _settle(self.folder / name)

    def make(
        self,
        cut: PreparedCut,
        out: str | Path,
        *,
        overwrite: bool = False,
        progress: BytesProgress | bool | None = None,
        check: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Fetch what a cut copies, make it in ``out``, and remove the sparse files."""
        make = partial(cut.write, out, overwrite=overwrite, check=check)
        if not self.sizes:
            make(progress=progress)
            return
        if sum(stop - start for _, start, stop in cut.reads) != cut.job.total_bytes:
            raise ModelError(
                f"the ranges of {self.name} that stay are not known: fetch it whole "
                f"(hf download {self.name}), and do the same again"
            )
        left = self.missing_bytes(cut.reads)
        self._check_room(left, cut.num_bytes, Path(out))
        total = left + cut.job.total_bytes
        if self.goes_on and not callable(progress):
            there, of = map(format_size, (cut.job.total_bytes - left, cut.job.total_bytes))
            say_goes_on(f"{there} of {of} are fetched", progress)
        with track_copy(progress, total, "fetch and copy") as report:
            self.fetch(cut.reads, lambda done: report(done, total))
            UNVERIFIED[self.name, self.folder.name] = self._unverified()
            make(progress=lambda done, _: report(left + done, total))
        self.remove()

    def _unverified(self) -> dict[str, str]:
        """Hash what has come of files in part; ModelError for a whole one that is not as stated."""
        found = {}
        for name, size in self.sizes.items():
            ranges, digest = _merged(self._come[name]), sha256()
            for one in ranges:
                for chunk in _read(self.folder / name, *one):
                    digest.update(chunk)
            if ranges != [(0, size)] or len(self.etags[name]) != 2 * digest.digest_size:
                found[name] = digest.hexdigest()
            elif digest.hexdigest() != self.etags[name]:
                self.remove()
                raise ModelError(
                    f"{constants.ENDPOINT} sends another {name} of {self.name} than it states: "
                    f"nothing of it is kept; try again, or name another server (HF_ENDPOINT)"
                )
        return found

    def open(self) -> None:
        """Make the sparse files, or find those of an earlier call, and fetch their headers.

        A header that is longer than any may be is left to be refused by who reads it.
        """
        with raise_output_error(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._load_journal()
            for name, size in self.sizes.items():
                _hollow(self.folder / name, size)
        stand_ins = {self.folder / name: size for name, size in self.sizes.items()}
        self.fetch(Piece(path, 0, min(8, size)) for path, size in stand_ins.items())
        headers = []
        for path, size in stand_ins.items():
            with path.open("rb") as file:
                stop = 8 + int.from_bytes(file.read(8), "little")
            if stop <= min(size, 8 + _MAX_HEADER_BYTES):
                headers.append(Piece(path, 8, stop))
        self.fetch(headers)

    def remove(self) -> None:
        """Remove the stand-ins."""
        if self.sizes:
            shutil.rmtree(_home(self.folder), ignore_errors=True)

    def _get(self, name: str, at: int, stop: int, *, come: Callable[[int], object]) -> None:
        """Fetch a range into its stand-in, from where the connection broke off if it does."""
        path, breaks = self.folder / name, 0
        with raise_output_error(path), path.open("r+b") as file:
            while at < stop and not self._stop.is_set():
                begun = kept = file.seek(at)
                for chunk in self._stream(name, at, stop):
                    file.write(chunk)
                    at += len(chunk)
                    come(len(chunk))
                    if at - kept >= JOURNAL_BYTES:
                        self._keep(name, file, (kept, at))
                        kept = at
                    if self._stop.is_set():
                        break
                if kept < at:
                    self._keep(name, file, (kept, at))
                if at < stop:
                    breaks = breaks + 1 if at == begun else 0
                    if breaks >= TRIES:
                        raise self._refused("the connection breaks off again and again")
                    say(f"{constants.ENDPOINT} sends no more of {name}: asking again shortly")
                    time.sleep(2**breaks)

    def _stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of a range, from the cache if it has them; fewer if the connection breaks."""
        from huggingface_hub import hf_hub_url, try_to_load_from_cache, utils

        cached = try_to_load_from_cache(self.name, name, revision=self.folder.name)
        if isinstance(cached, str) and Path(cached).resolve().name == self.etags[name]:
            yield from _read(Path(cached), start, stop)
            return
        client: Any = utils  # which does not say what it exports
        request = {
            "url": hf_hub_url(self.name, name, revision=self.folder.name),
            "headers": {
                **client.build_hf_headers(),
                "Range": f"bytes={start}-{stop - 1}",
                "Accept-Encoding": "identity",
            },
            "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        }
        try:
            with client.http_stream_backoff("GET", **request) as response:
                client.hf_raise_for_status(response)
                self._check(response, name, (start, stop))
                left = stop - start
                with suppress(Exception):  # it broke off
                    for chunk in response.iter_bytes():
                        yield chunk[: max(0, left)]
                        left -= len(chunk)
                        if left < 0:
                            return
        except ShallowerError:
            raise
        except Exception as error:  # of the hub's client, which has had several
            raise self._refused(hub_refusal(self.name, "model") or why(error)) from error

    def _check(self, response: Any, name: str, asked: Range) -> None:
        """Refuse an answer that is not of the range that was asked for, or of another file."""
        way_out = f"fetch the model whole (hf download {self.name}), and do the same again"
        if response.status_code != 206:
            raise ModelError(
                f"{constants.ENDPOINT} does not send ranges of {name}, by which {self.name} is cut "
                f"without being fetched whole: {way_out}"
            )
        expected = f"bytes {asked[0]}-{asked[1] - 1}/{self.sizes[name]}"
        found = response.headers.get("Content-Range")
        if found != expected:
            raise ModelError(
                f"{constants.ENDPOINT} sends another range of {name} of {self.name} ({found}), "
                f"expected {expected}: {way_out}"
            )
        if (etag := etag_of(response)) != self.etags[name]:
            raise ModelError(
                f"{constants.ENDPOINT} sends another content of {name} of {self.name} (ETag "
                f"{etag or 'missing'}), expected {self.etags[name]}, as it states: {way_out}"
            )

    def _refused(self, reason: str) -> ModelError:
        return ModelError(
            f"cannot fetch {self.name}: {reason}; what has come stays in {_home(self.folder)}: do "
            f"the same again to go on, or delete it"
        )

    def _check_room(self, left: int, num_bytes: int, out: Path) -> None:
        """Refuse a disk without room for what is fetched, and the cut if it lies there too."""
        parent = next(one for one in out.absolute().parents if one.exists())
        is_same = parent.stat().st_dev == self.folder.stat().st_dev
        needed, free = left + num_bytes * is_same, free_bytes(self.folder)
        if needed > free:
            raise OutputError(
                f"cannot fetch {self.name} into {_home(self.folder)}: {format_size(needed)} are "
                f"needed with the cut, {format_size(free)} are free there: make room, or choose "
                f"another place (HF_ASSETS_CACHE)"
            )

    def _keep(self, name: str, file: Any, come: Range) -> None:
        """Note what has come, once it is on the disk."""
        file.flush()
        os.fsync(file.fileno())
        with self._lock, (self.folder / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([name, self.etags[name], *come]) + "\n")
            self._come[name].append(come)

    def _load_journal(self) -> None:
        """Read what has come, without a line that is cut off, and forget files that are gone."""
        journal = self.folder / _JOURNAL
        lines = journal.read_text("utf-8").splitlines(keepends=True) if journal.is_file() else []
        kept = []
        for line in lines:
            with suppress(ValueError, TypeError):
                name, etag, start, stop = json.loads(line if line.endswith("\n") else "")
                path = self.folder / name
                is_there = path.is_file() and path.stat().st_size == self.sizes.get(name)
                if is_there and etag == self.etags[name]:
                    self._come[name].append((int(start), int(stop)))
                    kept.append(line)
        self.goes_on = bool(kept)
        if kept != lines:
            write_file(journal, "".join(kept).encode())


def open_on_hub(request: "Request") -> HubCheckpoint | None:
    """Find a model of the hub that can be cut as it is stored; None if it must be loaded.

    One that lies whole in the hub's cache is taken from there. Of others the small files are
    fetched into that cache, and the headers of the weights.
    """
    name = hub_id(request.source)
    if name != request.source or request.gguf_file is not None or request.text_only:
        return None
    from huggingface_hub import cached_assets_path, hf_hub_download, snapshot_download

    is_absent = constants.HF_HUB_OFFLINE or hub_absence() is not None
    with track(f"look at {name} on the hub", show=request.show), hushed():
        try:
            found = hf_hub_download(name, CONFIG_FILE, local_files_only=is_absent)
        except Exception:  # loading the model says what is wrong
            return None
        snapshot = Path(found).parent
        with raise_fetch_error(name):
            files = () if is_absent else hub_files(name, snapshot.name)
            sizes = {one.rfilename: one.size or 0 for one in files}
            if MODULES_FILE in sizes:
                hf_hub_download(name, MODULES_FILE, revision=snapshot.name)
            beside = _beside(snapshot, sizes)
            if beside:
                patterns = [escape(one) for one in beside]
                snapshot_download(name, revision=snapshot.name, allow_patterns=patterns)
        weights = _weights(snapshot, sizes or [one.name for one in snapshot.iterdir()])
        if not weights or request.dtype not in (None, stored_dtype(snapshot)):
            return None
        if all((snapshot / one).is_file() for one in weights):
            return HubCheckpoint(name, snapshot, {})
        if is_absent:
            return None
        warn_of_mirror(name)
        key, assets = hash_of(str(request.out.absolute()))[:16], constants.HF_ASSETS_CACHE
        within = f"cut-{key}", f"models--{name.replace('/', '--')}"
        with raise_output_error(assets):
            home = cached_assets_path("shallower", *within, assets_dir=assets)
            folder = home / "snapshots" / snapshot.name
            for one in beside:
                (folder / one).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(snapshot / one, folder / one)
        stand_ins = {one: sizes[one] for one in weights if one in sizes and _is_plain(one)}
        etags = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id or "" for one in files}
        remote = HubCheckpoint(name, folder, stand_ins, etags=etags, show=request.show)
        remote.open()
        return remote


def _beside(snapshot: Path, sizes: Mapping[str, int]) -> list[str]:
    """The files of a repository that lie beside the weights, and their index."""
    modules = module_folders(snapshot, (one.partition("/")[0] for one in sizes if "/" in one))
    found = [one for one in sizes if is_beside(one, modules) or one == INDEX_FILE]
    large = [one for one in found if sizes[one] > MAX_CARRIED_BYTES]
    for one in large:
        warnings.warn(f"{one} is left out: it is too large", stacklevel=2)
    return [one for one in found if one not in large]


def _weights(snapshot: Path, there: Collection[str]) -> list[str]:
    """The files of weights of a model, of which some are there; none of a model in other files."""
    if SINGLE_FILE in there:
        return [SINGLE_FILE]
    index = snapshot / INDEX_FILE
    places = read_json(index).get("weight_map") if index.is_file() else None
    return sorted({*map(str, places.values())}) if isinstance(places, dict) else []


def _is_plain(name: str) -> bool:
    """Whether a file of weights has a name of its own, which the core requires."""
    return name.endswith(".safetensors") and Path(name).name == name


def _home(folder: Path) -> Path:
    """All that is kept of a cut, by the folder of its stand-ins."""
    return folder.parents[2]


def _hollow(path: Path, size: int) -> None:
    """Make a file of a size that holds nothing, unless it is there."""
    if not path.is_file() or path.stat().st_size != size:
        with path.open("wb") as file:
            file.truncate(size)
    _settle(path)


def _settle(path: Path) -> None:
    """Give a stand-in the time of change that all have: what comes into it changes no content."""
    os.utime(path, (0, 0))


def _read(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (chunk := file.read(min(stop - start, _CHUNK_BYTES))):
            start += len(chunk)
            yield chunk


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in their order, those that touch as one."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        elif start < stop:
            found.append((start, stop))
    return found


def _without(wanted: Iterable[Range], there: Iterable[Range]) -> Iterator[Range]:
    """What of ranges is in none of others; both in their order, and apart."""
    for start, stop in wanted:
        for first, last in there:
            if first < stop and last > start:
                if start < first:
                    yield start, first
                start = last
        if start < stop:
            yield start, stop
