"""A study that is shared, in parts that are measured into stores.

Results are found by content alone (``store.store``), so the study itself runs last, in one process,
and measures nothing again. Repeated by workers are loading, tokenising, cuts and trials that
several choose at once, the whole model's answers, and a curve's scan and costs. Healings stay with
the study, because all of its settings decide them.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from ..errors import (
    CacheError,
    ProcessesError,
    ScanError,
    SettingsError,
    others_go_on,
)
from ..models.source import ModelSource
from ..progress import part, track
from ..settings.studies import CompareSettings, CurveSettings
from ..storage import absolute
from ..store.inputs import check_machine, check_made_by, made_by, model_inputs
from ..store.store import Store, open_store
from ..studies.compare import CompareStudy
from ..studies.study import Part
from ..texts.sources import Texts
from ..values.estimates import MemoryPlan
from ..workers.units import Ledger
from .engines import memory_of
from .shards import MadeShard
from .work import Opened, SharedWork, progress_of

SETTINGS = {one.COMMAND: one for one in (CompareSettings, CurveSettings)}
"""The settings of a study that is shared, by its command."""

DESCRIBED = ("models", "places", "texts", "settings", "identities", "expects")
"""What a shard says of its study, from which a process makes it again."""


def opened(
    described: Mapping[str, Any], store: Store, *, as_named: bool, **more: Any
) -> CompareStudy:
    """Open a study that another process described; models ``as_named`` there, or by whole places.

    ProcessesError: processors, models or texts are not those of that process.
    """
    for identity in described["identities"]:
        check_machine(identity["machine"])
    models = [
        ModelSource(**{**given, "path": given["path"] if as_named else place})
        for given, place in zip(described["models"], described["places"], strict=True)
    ]
    texts = {name: Texts(place, n) for name, place, n in described["texts"]}
    eval_texts = texts.pop("", None)
    study = CompareStudy(
        models=models,
        texts=texts,
        eval_texts=eval_texts,
        settings=SETTINGS[described["kind"]](**described["settings"]),
        store=store,
        identities=described["identities"],
        **more,
    )
    hashes = open_store()
    for model, identity in zip(models, described["identities"], strict=True):
        here = model_inputs(model, store if hashes.folder is None else hashes)
        if here is None or _without_places(here) != _without_places(identity):
            raise ProcessesError(f"{model} here is not the model of the driver")
    if [study.fitted, study.reported] != described["expects"]["texts"]:
        raise ProcessesError("the texts here are not those of the driver")
    return study


def _without_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity of a model without the names of its folder, the machine and its threads."""
    model = {**identity["model"], "names": None}
    return {**identity, "model": model, "machine": None, "threads": None}


def is_known(study: CompareStudy, part: Part) -> bool:
    """Whether the store has the measurements of a part."""
    return study.store.get("study", study.part_inputs(part)) is not None


def open_study(described: Mapping[str, Any], folder: Path | None, _: Any) -> Opened:
    """Open a study; its model stays loaded from one part to the next."""
    own = folder or Path(mkdtemp(prefix="shallower-"))
    store = Store(Path(described["store"] or own / "store"))
    study = opened(described, store, as_named=False, out=own / "out", progress=False)
    if folder is None:
        finalize(study, shutil.rmtree, own, ignore_errors=True)
    parts = dict(zip(described["units"], study.parts(), strict=True))
    make, sent = study.maker(), dict[str, int]()

    def value(unit: str) -> dict[str, Any]:
        if not is_known(study, parts[unit]):
            make(parts[unit])
            store.put("study", study.part_inputs(parts[unit]), {"part": unit})
        return {"part": unit}

    def values(units: Sequence[str], failed: dict[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        name, is_one = f"{described['kind']}, {len(units)} parts", len(study.models) == 1
        with track(name, len(units), progress_of(folder)):
            for unit in units:
                alone = nullcontext() if is_one else others_go_on(unit, failed)
                with part(1, unit), track(unit), alone:
                    found[unit] = value(unit)
        return found

    is_sent = described["store"] is None  # else its store is that of the driver
    entries = partial(store.give, sent) if is_sent else dict
    return Opened(described, value, entries=entries, values=values)


class StudyWork(SharedWork):
    """A study: a unit is a part, whose measurements go into the store."""

    opens, results = staticmethod(open_study), CompareStudy.RESULTS
    is_exact = False  # what a worker sends depends on what it has sent

    def prepare(self) -> None:
        """Refuse what cannot be, as :meth:`Study.check`; and healings of a shard.

        Shards do not have them, and ``gather`` would leave them out.
        """
        self.kind = self.job.settings.COMMAND
        self.job.check()
        if self.shard is not None and "healed" in self.job.settings.states:
            raise SettingsError(
                "a shard heals no cut: leave out healed (states, --states), or share the work by "
                "workers (--workers)"
            )
        self.models = [one for one in self.job.models if isinstance(one, ModelSource)]
        self.store, self._parts = self.job.store, {str(one): one for one in self.job.parts()}
        self.reads, self.units = self.job.reads, [*self._parts]

    @property
    def is_known(self) -> bool:
        """Whether the whole study is cached."""
        return self.job.entry is not None

    def memory(self) -> MemoryPlan:
        """Forecast what a forward of the largest model takes."""
        return memory_of(self.models, self.job.settings.tokens)

    def described(self) -> dict[str, Any]:
        """The study as it is opened, with the store of workers on this machine."""
        study, models = self.job, self.models
        named = [*study.named_texts.items()]
        named += [] if study.eval_texts is None else [("", study.eval_texts)]
        texts = [(name, one) for name, one in named if isinstance(one, Texts)]
        if len(models) < len(study.models) or len(texts) < len(named):
            raise ProcessesError("workers read models and texts themselves: name files or datasets")
        if study.store.folder is None:
            raise ProcessesError(
                "what is shared is put together in the cache: leave out --no-cache"
            )
        if study.inputs is None:
            raise ProcessesError(
                "work can be shared only for models whose files can be hashed, and with built-in "
                "criteria"
            )
        is_near = self.shard is None and self.on == "local"
        settings = study.shared_settings()
        return {
            "kind": self.kind,
            "source": {"device_map": models[0].device_map},  # by which an engine takes GPUs
            "models": [{**asdict(one), "path": str(one.path)} for one in models],
            "places": [absolute(str(one.path)) for one in models],
            "texts": [[name, absolute(one.source), one.limit] for name, one in texts],
            "settings": {one.name: _plain(getattr(settings, one.name)) for one in fields(settings)},
            "identities": list(study.of_models.values()),
            "job": study.job,
            "units": self.units,
            "store": str(study.store.folder.absolute()) if is_near else None,
            "expects": {"versions": made_by(), "texts": [study.fitted, study.reported]},
        }

    def held(self) -> AbstractContextManager[None]:
        """Hold the folder of the study."""
        return self.job.alone()

    def inputs(self, unit: str) -> dict[str, Any]:
        """All that the measurements of a part depend on, whichever study it is of."""
        return self.job.part_inputs(self._parts[unit])

    def give_up(self, ledger: Ledger) -> None:
        """Say which parts failed too often: the study measures them itself."""
        for name, errors in ledger.given_up.items():
            said = f"{name} failed {len(errors)} times, by {errors[-1]}: it is measured here"
            print(said, file=sys.stderr, flush=True)

    def finish(self) -> Any:
        """Carry the study out, which finds what was measured: that is of today, and not said."""
        done = self.job.run()
        getattr(self.job, "found", []).clear()
        return done

    @classmethod
    def gather(
        cls,
        shards: Sequence[MadeShard],
        out: Path,
        *,
        overwrite: bool,
        trust_remote_code: bool,
    ) -> tuple[CompareStudy, Any]:
        """Carry out the study of some shards, caching only the entries that it asks for.

        Returns it, and its results. ProcessesError: shards are without a measurement, or of other
        packages, processors, models or texts than are here; or of a model that runs its own code,
        without ``trust_remote_code``.
        """
        kind, described, store = shards[0].kind, shards[0].described, open_store()
        if missing := [name for name in DESCRIBED if name not in described]:
            raise ScanError(f"the shards do not describe their {kind}: {', '.join(missing)}")
        check_made_by(shards[0].versions)
        if store.folder is None:
            raise ProcessesError("there is no cache to put shards into: name one (SHALLOWER_CACHE)")
        has_code = any(of["trust_remote_code"] for of in described["models"])
        if (has_code or described["settings"].get("tasks_dir")) and not trust_remote_code:
            raise ProcessesError(
                "gather runs no code that comes with a model or with tasks by the word of a file: "
                "allow it yourself (trust_remote_code=True, --trust-remote-code)"
            )
        given = [one["path"] for one in described["models"]]
        is_here = described["places"] == list(map(absolute, given))
        study = opened(described, store, as_named=is_here, out=out, overwrite=overwrite)
        for one in shards:
            try:
                store.offer(one.entries)
            except CacheError as error:
                raise ScanError(f"shard {one.shard}: {error}") from error
        failed = {name for one in shards for name in one.failed}
        lacking = [str(part) for part in study.parts() if not is_known(study, part)]
        if lacking := [name for name in lacking if name not in failed]:
            raise ProcessesError(
                f"the shards have no measurement of {', '.join(lacking[:3])}: delete them, and "
                f"make them anew ({kind} --shard)"
            )
        return study, cls(study, shard=shards[0].shard).finish()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return absolute(str(value))
    return [getattr(one, "name", one) for one in value] if isinstance(value, tuple) else value
