"""Parts of a study, measured by workers or by hand into stores that are put together.

Results are found by content alone (``store.store``), so the study itself runs last, in one process,
and measures nothing again. Repeated by workers are loading, tokenising, cuts and trials that
several choose at once, the whole model's answers, and a curve's scan and costs. Healings stay with
the study, because all of its settings decide them.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal
from weakref import finalize

from ..errors import CacheError, ProcessesError, why
from ..models.source import ModelSource
from ..progress import part, track
from ..storage import check_apart, resumable_file, write_file
from ..store.inputs import check_machine, check_made_by, made_by, model_inputs
from ..store.store import Store, open_store
from ..studies.study import Part, Study
from ..texts.sources import Texts
from ..values.hashing import hash_of
from ..values.schema import of_type
from ..values.shard import Shard, shard_files
from ..workers.units import Job
from .engines import hand_out, memory_of
from .shards import absolute, check_workers

if TYPE_CHECKING:
    from ..studies.compare import CompareStudy
    from ..values.comparison import CriteriaComparison

OPENER = f"{__name__}:OpenedStudy"
"""What a worker opens."""

_SHARD = ("job", "index", "count", "described", "entries", "sha256")


def share(study: Study[Any], workers: int | None, on: Literal["local", "ray"] = "local") -> None:
    """Let workers measure a study's missing parts, into this store or to be sent back to it.

    ProcessesError if that is impossible, else as :meth:`Study.check`.
    """
    models = [one for one in study.models if isinstance(one, ModelSource)]
    check_workers(workers, on, "work", *models)
    study.check()
    described = describe(study, store=study.store.folder if on == "local" else None)
    if study.entry is not None:
        return
    with study.alone():
        ledger = hand_out(
            Job(OPENER, described),
            described["parts"],
            [str(part) for part in study.parts() if is_known(study, part)],
            name=f"{study.KIND}, parts",
            keep=lambda _, content: study.store.take(json.loads(content)),
            exact=False,  # what a worker sends depends on what it has sent
            progress=study.progress,
            workers=workers,
            on=on,
            memory=lambda: memory_of(models, study.settings.tokens),
        )
    for name, errors in ledger.given_up.items():
        said = f"{name} failed {len(errors)} times, by {errors[-1]}: it is measured here"
        print(said, file=sys.stderr, flush=True)


def is_known(study: Study[Any], part: Part[Any]) -> bool:
    """Whether the store has the measurements of a part."""
    return study.store.get("part", study.part_inputs(part)) is not None


def describe(study: Study[Any], *, store: Path | None = None) -> dict[str, Any]:
    """A study as workers receive it: names, hashes and settings, no weights and no texts.

    They use the ``store`` of a folder, or one of their own. ProcessesError: it cannot be shared.
    """
    models = [one for one in study.models if isinstance(one, ModelSource)]
    named = [*study.named_texts.items(), ("", study.eval_texts)]
    texts = [(name, one) for name, one in named if isinstance(one, Texts)]
    if len(models) < len(study.models) or len(texts) < len(named):
        raise ProcessesError("workers read models and texts themselves: name files or datasets")
    if study.store.folder is None:
        raise ProcessesError("what is shared is put together in the cache: leave out --no-cache")
    if study.inputs is None:
        raise ProcessesError(
            "what is shared must be known by its content: models of whose files all is known, and "
            "criteria of this package"
        )
    settings = study.shared_settings()
    return {
        "kind": study.KIND,
        "source": {"device_map": models[0].device_map},  # by which an engine takes GPUs
        "models": [{**asdict(one), "path": str(one.path)} for one in models],
        "places": [absolute(str(one.path)) for one in models],
        "texts": [[name, absolute(one.source), one.limit] for name, one in texts],
        "settings": {one.name: _plain(getattr(settings, one.name)) for one in fields(settings)},
        "identities": list(study.of_models.values()),
        "parts": list(map(str, study.parts())),
        "store": None if store is None else str(store.absolute()),
        "expects": {
            "versions": made_by(),
            "texts": [study.fitted, study.reported],
        },
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return absolute(str(value))
    return [getattr(one, "name", one) for one in value] if isinstance(value, tuple) else value


def opened(
    described: Mapping[str, Any], store: Store, *, as_named: bool, **more: Any
) -> Study[Any]:
    """Open a study that another process described; models ``as_named`` there, or by whole places.

    ProcessesError: packages, processors, models or texts are not those of that process.
    """
    from ..studies.compare import CompareStudy
    from ..studies.curve import CurveStudy

    expects = described["expects"]
    check_made_by(expects["versions"])
    for identity in described["identities"]:
        check_machine(identity["machine"])
    kinds: dict[str, Any] = {one.KIND: one for one in (CompareStudy, CurveStudy)}
    models = [
        ModelSource(**{**given, "path": given["path"] if as_named else place})
        for given, place in zip(described["models"], described["places"], strict=True)
    ]
    *texts, (_, eval_texts) = [(name, Texts(place, n)) for name, place, n in described["texts"]]
    kind = kinds[described["kind"]]
    study: Study[Any] = kind(
        models=models,
        texts=dict(texts),
        eval_texts=eval_texts,
        settings=kind.SETTINGS(**described["settings"]),
        store=store,
        identities=described["identities"],
        **more,
    )
    hashes = open_store()
    for model, identity in zip(models, described["identities"], strict=True):
        here = model_inputs(model, store if hashes.folder is None else hashes)
        if here is None or _without_places(here) != _without_places(identity):
            raise ProcessesError(f"{model} here is not the model of the driver")
    if [study.fitted, study.reported] != expects["texts"]:
        raise ProcessesError("the texts here are not those of the driver")
    return study


def _without_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity of a model without the names of its folder and the machine."""
    return {**identity, "model": {**identity["model"], "names": None}, "machine": None}


class OpenedStudy:
    """A study that a worker has opened; its model stays loaded from one part to the next."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        folder, shared = Path(mkdtemp(prefix="shallower-")), described["store"]
        finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.store = Store(Path(shared or folder / "store"))
        self._sends, self._sent = shared is None, dict[str, int]()
        self._study = opened(
            described, self.store, as_named=False, out=folder / "out", progress=False
        )
        self._parts = dict(zip(described["parts"], self._study.parts(), strict=True))
        self._make = self._study.maker()
        self.hello: dict[str, Any] = {}

    def run(self, unit: str) -> bytes:
        """Measure a part; what its store has more, unless it is that of the driver."""
        part = self._parts[unit]
        if not is_known(self._study, part):
            self._make(part)
            self.store.put("part", self._study.part_inputs(part), {"part": unit})
        return json.dumps(self.store.give(self._sent) if self._sends else {}).encode()


# Parts by hand.
def measure_shard(study: "CompareStudy", shard: Shard) -> dict[str, Any]:
    """Measure every N-th part of a comparison into a file in its folder, or go on with that.

    Gives what is in the file, but measurements. Raises ProcessesError as :func:`share`, and
    OutputError.
    """
    place = study.folder / shard.file_of(study.KIND)
    described = describe(study)
    check_apart(place, study.reads)
    mine = described["parts"][shard.index :: shard.count]
    found = {"shard": str(shard), "parts": mine, "num_parts": len(described["parts"])}
    found["written"] = [str(place)]
    if not study.overwrite and place.is_file() and _read(place)["job"] == study.job:
        return found
    with resumable_file(place, str(study.job), study.overwrite) as folder:
        worker = OpenedStudy({**described, "store": str(folder / "store")})
        with track(f"{study.KIND}, shard {shard}", len(mine), study.progress):
            for name in mine:
                with part(1, name), track(name):
                    worker.run(name)
        entries = worker.store.give({})
        of = study.job, shard.index, shard.count, described, entries
        content = dict(zip(_SHARD, of, strict=False))
        content["sha256"] = hash_of(content)
        write_file(folder / place.name, json.dumps(content).encode())
    return found


def gather_study(
    parts: Iterable[Path], out: Path, *, overwrite: bool = False, trust_remote_code: bool = False
) -> "tuple[CompareStudy, CriteriaComparison]":
    """Carry out the comparison of some shards, caching only the entries that it asks for.

    Raises:
        ProcessesError: shards are damaged, missing, without a measurement or of different
            comparisons, or of other packages, processors, models or texts than are here; or of a
            model that runs its own code, without ``trust_remote_code``.
        ShallowerError: as :func:`shallower.compare`.
    """
    read = {file: _read(file) for file in shard_files(parts, "compare")}
    (first, shard), *others = read.items()
    check_made_by(shard["described"]["expects"]["versions"])
    for file, other in others:
        if (other["job"], other["count"]) != (shard["job"], shard["count"]):
            raise ProcessesError(f"{first} and {file} are shards of different comparisons")
    there, count = {one["index"] for one in read.values()}, shard["count"]
    missing = [f"{index}/{count}" for index in range(count) if index not in there]
    if missing:
        raise ProcessesError(f"shards are missing: {', '.join(missing)}")
    store, described = open_store(), shard["described"]
    if store.folder is None:
        raise ProcessesError("there is no cache to put shards into: name one (SHALLOWER_CACHE)")
    if any(one["trust_remote_code"] for one in described["models"]) and not trust_remote_code:
        raise ProcessesError(
            "gather runs no code that comes with a model by the word of a file: allow it yourself "
            "(trust_remote_code=True, --trust-remote-code)"
        )
    given = [one["path"] for one in described["models"]]
    is_here = described["places"] == list(map(absolute, given))
    study: Any = opened(described, store, as_named=is_here, out=out, overwrite=overwrite)
    if study.KIND != "compare":
        raise ProcessesError(f"{first} is of a {study.KIND}: expected shards of a comparison")
    for file, one in read.items():
        try:
            store.offer(one["entries"])
        except CacheError as error:
            raise ProcessesError(f"{file}: {error}") from error
    if lacking := [str(part) for part in study.parts() if not is_known(study, part)]:
        raise ProcessesError(
            f"the shards have no measurement of {', '.join(lacking[:3])}: make them anew "
            f"(compare --shard --overwrite)"
        )
    done = study.run()
    study.found.clear()  # of the shards
    return study, done


def _read(file: Path) -> dict[str, Any]:
    """A shard from its file; ProcessesError if it is none, or damaged."""
    try:
        found = of_type(dict, json.loads(file.read_bytes()))
        content = {name: found[name] for name in _SHARD if name != "sha256"}
        if hash_of(content) == found["sha256"]:
            return content
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProcessesError(
            f"{file} is damaged, or no shard of a comparison: {why(error, file)}"
        ) from error
    raise ProcessesError(f"{file} is damaged: make it anew (compare --shard --overwrite)")
