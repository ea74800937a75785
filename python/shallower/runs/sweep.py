"""A sweep: models × texts × criteria × sizes from one file, as jobs that are independent.

A job is an ordinary command of this package with a folder of its own, whose name is a hash of all
that its results depend on but the machine. So what is there is known by its place, whoever made it.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import (
    CriterionError,
    LayersError,
    MissingExtraError,
    SettingsError,
    ShallowerError,
    TextsError,
    raise_output_error,
)
from ..models.source import ModelSource
from ..processes import is_held, refuse_several
from ..progress import say_goes_on
from ..reporting.results import JOB_FILES, is_sweep, read_job
from ..sharing.engines import hand_out, memory_of
from ..storage import check_apart, check_free, claimed, write_file
from ..store.inputs import check_made_by, inputs_of, made_by
from ..store.store import Store, open_store
from ..texts.sources import Texts
from ..values.commands import option_words
from ..values.files import SWEEP_FILE
from ..values.hashing import hash_of
from ..values.layers import check_sizes
from ..values.sweep import JobKind, Sweep, SweepJob
from ..workers.units import Job
from .sweep_file import SweepFile, read_sweep

_LOOKED_AT = 0.2
"""Seconds between two looks at a process that runs."""


def sweep(
    file: str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    on: Literal["local", "ray"] = "local",
    progress: bool | None = None,
) -> Sweep:
    """Compare criteria on all models and texts of a file, and scan and heal as it says.

    A sweep falls into jobs, each a command in a process of its own with a folder below
    ``out/jobs``: a comparison of all criteria and sizes and a scan for every model and text, and a
    curve of one point for every cut that is healed. A job that fails is recorded, and the others go
    on. Called again with the same arguments, only jobs that are not done are carried out.

    Args:
        file: YAML with the keys ``models``, ``texts`` and ``eval_texts``, each a place or a list of
            places, and maybe ``criteria``, ``n``, ``states``, ``heal_steps``, ``losses``,
            ``dtype``, ``device_map``, ``trust_remote_code``, ``max_length``, ``batch_size``,
            ``max_texts``, ``max_eval_texts``, ``seed``. Places are seen from the current folder.
        out: the folder to write to: ``sweep.json``, and the jobs.
        workers: jobs at once, one by default, which share the cores of this machine; on a cluster
            as many as it has room for by default.
        on: where jobs are carried out: by ``local`` processes, or on the ``ray`` cluster that
            RAY_ADDRESS names, whose nodes see the same folders.
        progress: a bar with ETA on standard error; by default if that is a terminal.

    Returns:
        The jobs and how they ended; :func:`report` writes the page of their results.

    Raises:
        SettingsError: a key or value of the file, with its line: what is not there, a model that
            does not exist, a criterion or a size that a model cannot have.
        OutputError: ``out`` holds something else, or cannot be written to.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> import yaml
        >>> asked = {"models": ["HuggingFaceTB/SmolLM2-135M"], "texts": "c4.jsonl"}
        >>> asked |= {"eval_texts": "c4_eval.jsonl", "criteria": ["angular", "deepest"], "n": [1]}
        >>> with open("sweep.yaml", "w") as file:
        ...     yaml.safe_dump(asked, file)
        >>> done = sh.sweep("sweep.yaml", "sweeps/smol")
        >>> [(job.kind, job.state) for job in done.jobs]
        [('compare', 'done'), ('scan', 'done')]
        >>> sh.report("sweeps/smol").name
        'report.html'
    """
    return SweepRun(read_sweep(Path(file)), Path(out), workers, on, progress).run()


@dataclass(frozen=True)
class SweepRun:
    """A sweep into a folder, which is checked when it is made.

    Attributes:
        file: what it is of.
        out: the folder to write to.
        workers: jobs at once.
        on: where they are carried out.
        progress: a bar on standard error; by default if that is a terminal.
        store: of cached results.

    Raises:
        SettingsError, OutputError: as :func:`sweep`.
    """

    file: SweepFile
    out: Path
    workers: int | None = None
    on: Literal["local", "ray"] = "local"
    progress: bool | None = None
    store: Store = field(default_factory=open_store)
    _known_content: dict[tuple[str, str, bool], Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        refuse_several("sweeps are")
        if self.workers is not None and (type(self.workers) is not int or self.workers < 1):
            raise SettingsError(
                f"workers = {self.workers!r}: expected a whole number, at least 1 (--workers)"
            )
        self._check_places()
        self._check_studies()

    # What is refused before anything is loaded.
    def _check_places(self) -> None:
        file = self.file
        places = [model.place for model in file.models.values()]
        for written in (self.out / SWEEP_FILE, self.out / "jobs"):
            check_apart(written, [file.path, *places, *file.texts.values(), file.eval_texts])
        check_free(self.out / SWEEP_FILE, overwrite=is_sweep(self.out))

    def _check_studies(self) -> None:
        """Check the study of every job; of its model the config is read."""
        file = self.file
        with file.at("eval_texts"):
            eval_texts = Texts(file.eval_texts).check()
        for texts, place in file.texts.items():
            with file.at(f"texts: {texts}"):
                read = Texts(place).check()
            for model, source in file.models.items():
                with self._named(model, texts):
                    source.count_layers()
                    self._check(source, {texts: read}, eval_texts)

    def _check(self, model: ModelSource, texts: Mapping[str, Texts], eval_texts: Texts) -> None:
        from ..studies.compare import CompareStudy
        from ..studies.curve import CurveStudy

        given: dict[str, Any] = {"models": (model,), "texts": texts, "eval_texts": eval_texts}
        given |= {"out": None, "store": self.store}
        compared = CompareStudy(settings=self.file.settings, **given)
        check_sizes(self.file.settings.n, model.count_layers())
        if self.file.healing is not None:
            names = [criterion.name for criterion in compared.criteria]
            CurveStudy(settings=self.file.healed(names, *self.file.settings.n), **given).check()

    @contextmanager
    def _named(self, model: str, texts: str) -> Iterator[None]:
        """Name in an error the model, and the key that it is of."""
        try:
            yield
        except ShallowerError as error:
            keys = {
                CriterionError: "criteria",
                LayersError: "n",
                TextsError: f"texts: {texts}",
                MissingExtraError: "states",
            }
            with self.file.at(keys.get(type(error), f"models: {model}")):
                raise ShallowerError(f"{model}: {error}") from error

    # What is to be done.
    @cached_property
    def jobs(self) -> tuple[SweepJob, ...]:
        """All jobs, by model and texts; those that are done are told by what lies in their folder.

        Criteria and sizes of one model on one text are one job, for they share its loading, states
        and trials, and their regrets are paired; a healing takes longer than all that.
        """
        return tuple(
            self._looked_up(self._job(kind, about, words, model=model, texts=texts))
            for model in self.file.models
            for texts in self.file.texts
            for kind, about, words in self._commands()
        )

    def _commands(self) -> Iterator[tuple[JobKind, str, list[str]]]:
        """The commands on one model and one text: what each is about, and its options."""
        file, settings = self.file, self.file.settings
        yield "compare", "", settings.to_words()
        shared = ("max_length", "batch_size", "max_texts")
        options = {name: getattr(settings, name) for name in shared}
        yield "scan", "", option_words({**options, "metrics": "angular", "keep_samples": True})
        for criterion in self._healed_criteria:
            for n in settings.n:
                yield "curve", f"-{criterion}-{n}", file.healed([criterion], n).to_words()

    @property
    def _healed_criteria(self) -> Sequence[str]:
        """The criteria whose cuts are healed."""
        if self.file.healing is None:
            return ()
        if self.file.settings.criteria is not None:
            return self.file.settings.criteria
        from ..judgement.criteria import criteria

        return [*criteria]

    def _job(
        self, kind: JobKind, about: str, words: Sequence[str], *, model: str, texts: str
    ) -> SweepJob:
        file, source = self.file, self.file.models[model]
        loading = {"device_map": source.device_map, "trust_remote_code": source.trust_remote_code}
        dtype = None if source.dtype == "auto" else source.dtype
        places = [str(source.path), *option_words({"dtype": dtype, **loading})]
        places += ["--texts", file.texts[texts]]
        places += [] if kind == "scan" else ["--eval-texts", file.eval_texts]
        content = self._content(model, texts, whole=kind == "curve")
        mark = hash_of([kind, *words, content or places])[:10]
        name = f"{kind}-{_plain(model)}-{_plain(texts)}{about}-{mark}"
        out = ["--out", str(self.out / "jobs" / name), "--overwrite"]
        return SweepJob(name, kind, model, texts, (kind, *places, *words, *out))

    def _content(self, model: str, texts: str, *, whole: bool) -> dict[str, Any] | None:
        """All that the results of a job depend on beside its options and the machine.

        The ``whole`` of the texts, of a healing. None where that is not known.
        """
        key = model, texts, whole
        if key not in self._known_content:
            file, settings = self.file, self.file.settings
            limit = None if whole else settings.max_texts
            read = {
                "texts": Texts(file.texts[texts], limit),
                "eval_texts": Texts(file.eval_texts, settings.max_eval_texts),
            }
            found = inputs_of(self.store, {"model": file.models[model]}, read)
            if found is not None:
                del found["model"]["machine"]
            self._known_content[key] = found
        return self._known_content[key]

    def _looked_up(self, job: SweepJob) -> SweepJob:
        """A job, which is done if its folder has its results."""
        found = read_job(self.out, job)
        if found is None:
            return job
        error = next((one.failed for one in getattr(found, "points", ()) if one.failed), None)
        return replace(job, state="failed" if error else "done", error=error)

    # The work.
    def run(self) -> Sweep:
        """Carry out the jobs that are not done; the record is written after each."""
        with claimed(self.out / SWEEP_FILE, overwrite=True):
            jobs = {job.name: job for job in self.jobs}
            left = [job for job in jobs.values() if job.state != "done"]
            if 0 < len(left) < len(jobs):
                say_goes_on(f"{len(jobs) - len(left)} of {len(jobs)} jobs are done", self.progress)
            self._write(jobs)
            if left:
                self._carry_out(jobs, left)
            return self._sweep(jobs)

    def _carry_out(self, jobs: dict[str, SweepJob], left: Sequence[SweepJob]) -> None:
        """Let workers carry out the jobs that are left; the record is written after each."""

        def end(name: str, outcome: Mapping[str, Any]) -> str:
            jobs[name] = self._ended(jobs[name], outcome)
            self._write(jobs)
            return f"{name} {jobs[name].state}"

        models = {job.model: self.file.models[job.model] for job in left}
        ledger = hand_out(
            self._described(left),
            [job.name for job in left],
            name="sweep, jobs",
            keep=lambda name, content: end(name, json.loads(content)),
            exact=False,  # they tell their time
            progress=self.progress,
            workers=self.workers,
            on=self.on,
            memory=lambda: memory_of(models.values(), self.file.settings.tokens),
        )
        for name, errors in ledger.given_up.items():
            end(name, {"status": 1, "error": errors[-1], "seconds": 0.0})

    def _sweep(self, jobs: Mapping[str, SweepJob]) -> Sweep:
        file, of = self.file, tuple(jobs.values())
        return Sweep(file.path.name, of, file.losses, file.states)

    def _write(self, jobs: Mapping[str, SweepJob]) -> None:
        content = json.dumps(self._sweep(jobs).to_json(), indent=2) + "\n"
        write_file(self.out / SWEEP_FILE, content.encode())

    def _described(self, jobs: Sequence[SweepJob]) -> Job:
        """The jobs as workers receive them."""
        described = {
            job.name: {
                "words": [*job.words],
                "folder": str(Path.cwd()),
                "log": str(self.out / job.log),
                "results": str(self.out / job.folder / JOB_FILES[job.kind]),
            }
            for job in jobs
        }
        return Job(f"{__name__}:OpenedJobs", {"jobs": described, "versions": made_by()})

    def _ended(self, job: SweepJob, outcome: Mapping[str, Any]) -> SweepJob:
        """A job by what lies in its folder, and how its command ended."""
        found = replace(self._looked_up(job), seconds=round(outcome["seconds"], 3))
        if found.state == "waiting" or outcome["status"]:
            why = outcome["error"] or "it left no results that are seen from here"
            return replace(found, state="failed", error=why)
        return found


class OpenedJobs:
    """The jobs of a sweep that a worker may carry out."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        check_made_by(described["versions"])
        self._jobs, self._driver = described["jobs"], os.getppid()
        self.hello: dict[str, Any] = {}

    def run(self, unit: str) -> bytes:
        """Carry out a job; one that a killed sweep has left running is waited for."""
        job = self._jobs[unit]
        while is_held(Path(job["folder"], job["results"])):
            time.sleep(_LOOKED_AT)
        ended = run_job(job, lambda: os.getppid() != self._driver)
        return json.dumps(ended).encode()


def run_job(job: Mapping[str, Any], stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Carry out a command in a process of its own, until it ends or is ``stopped``.

    ``job`` and the answer are plain JSON values: ``words`` of the command behind ``shallower``, the
    ``folder`` that it works in and the ``log`` of what it prints; then its exit ``status``, the
    last sentence of its ``error`` and the ``seconds`` that it took.
    """
    log, began = Path(job["folder"], job["log"]), time.monotonic()
    command = [sys.executable, "-P", "-m", "shallower", *job["words"]]
    with raise_output_error(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        printed = log.open("wb")
    with (
        printed,
        subprocess.Popen(
            command,
            cwd=job["folder"],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            while process.poll() is None and not stopped():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOKED_AT)
        finally:
            process.terminate()
    status = process.returncode
    error = _last_error(log, status) if status else None
    return {"status": status, "error": error, "seconds": time.monotonic() - began}


def _last_error(log: Path, status: int) -> str:
    """The last sentence of a command that failed, by what it printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if status < 0:
        return f"it was ended by signal {-status}"
    return (errors or said or [f"it ended with status {status}"])[-1]


def _plain(name: str) -> str:
    """A name as a part of the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:40]
