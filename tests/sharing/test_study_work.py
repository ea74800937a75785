"""Parts of a study shared by workers and by hand: the study of one process comes of it."""

import json
from dataclasses import asdict

import pytest

from shallower.errors import CacheError, ProcessesError
from shallower.judgement.trials import Trials
from shallower.models.source import ModelSource
from shallower.settings.studies import CompareSettings, CurveSettings
from shallower.sharing import share as sharing
from shallower.sharing.share import open_work, share
from shallower.sharing.study_work import StudyWork, is_known
from shallower.store.store import Store, open_store
from shallower.studies.compare import CompareStudy
from shallower.studies.measuring import Measuring
from shallower.texts.sources import Texts
from tests.conftest import tiny_llama, write_jsonl
from tests.documents import documents

CRITERIA = ("angular", "greedy", "deepest")


@pytest.fixture(scope="module")
def places(tmp_path_factory, words):
    """Two checkpoints, texts and held-out texts."""
    folder = tmp_path_factory.mktemp("shared")
    for seed, name in enumerate(("tiny", "twin")):
        tiny_llama(4, seed=seed).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    write_jsonl(folder / "texts.jsonl", documents(12))
    write_jsonl(folder / "held_out.jsonl", documents(8, seed=1))
    return folder


def given(folder, *names):
    return {
        "models": tuple(ModelSource(folder / name) for name in names or ["tiny"]),
        "texts": {"texts": Texts(str(folder / "texts.jsonl"))},
        "eval_texts": Texts(str(folder / "held_out.jsonl")),
        "progress": False,
    }


def comparison(folder, *names, store=None, out=None, criteria=CRITERIA, **more):
    settings = CompareSettings(n=(1, 2), criteria=criteria, max_length=16)
    store = store or open_store()
    return CompareStudy(
        **{**given(folder, *names), **more}, settings=settings, out=out, store=store
    )


def curve(folder, out, *, store=None, **options):
    settings = CurveSettings(
        **{"n": (1, 2), "max_length": 16, "top": 2, "patch_tokens": 256, **options}
    )
    return CompareStudy(**given(folder), settings=settings, out=out, store=store or open_store())


def rows(found):
    """The rows without what a clock says, the models and what was skipped."""
    untimed = {"seconds": 0, "choice_seconds": 0}
    return [asdict(row) | untimed for row in found.rows], found.models, found.skipped


@pytest.fixture
def measured(monkeypatch):
    """What this process measures from now on."""
    done = []
    note, measure = Trials._note, Measuring._measure

    def noted(self, key, *found):
        done.append(key)
        note(self, key, *found)

    def made(self, *cut):
        done.append(cut)
        return measure(self, *cut)

    monkeypatch.setattr(Trials, "_note", noted)
    monkeypatch.setattr(Measuring, "_measure", made)
    return done


def in_this_process(study):
    """Carry out the parts as a worker far away would; what it sends."""
    described = far(study)
    worker = open_work(described)
    return [json.loads(worker.run(unit))["entries"] for unit in described["units"]]


def near(study, **how):
    """A study that workers share, here if nothing else is said."""
    return StudyWork(study, **({"workers": 2} | how))


def far(study):
    """A study as a worker far away receives it."""
    return json.loads(json.dumps(near(study, on="ray").described()))


def test_a_comparison_finds_all_that_its_parts_sent(places, tmp_path, measured):
    asked = {"criteria": ("greedy", "deepest")}
    alone = comparison(places, "tiny", "twin", store=Store(tmp_path / "alone"), **asked).run()
    study = comparison(places, "tiny", "twin", **asked)
    for entries in in_this_process(study):
        study.store.take(entries)
    measured.clear()
    assert rows(study.run()) == rows(alone)
    assert measured == []


@pytest.mark.slow
def test_a_curve_finds_all_that_its_parts_sent(places, tmp_path, measured):
    alone = curve(places, tmp_path / "alone", store=Store(tmp_path / "store")).run()
    study = curve(places, tmp_path / "out")
    for entries in in_this_process(study):
        study.store.take(entries)
    measured.clear()
    assert rows(study.run()) == rows(alone)
    assert measured == []


@pytest.mark.slow
def test_workers_of_this_machine_make_the_comparison(places, measured, tmp_path):
    alone = comparison(places, store=Store(tmp_path / "alone")).run()
    study = comparison(places)
    measured.clear()
    share(near(study))
    assert rows(study.run()) == rows(alone)
    assert measured == []
    share(near(comparison(places)))  # nobody is started for what is known


@pytest.mark.slow
def test_a_worker_that_dies_loses_only_its_part(places, tmp_path, measured, monkeypatch, capfd):
    alone = comparison(places, store=Store(tmp_path / "alone")).run()
    monkeypatch.setattr(sharing, "OPENER", "tests.studies.poisoned:dying")
    for name, deaths in (("once", 1), ("always", 9)):
        monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / name))
        monkeypatch.setenv("DEATHS", f"{tmp_path / name}.deaths:{deaths}")
        study = comparison(places)
        measured.clear()
        share(near(study, workers=1))
        assert rows(study.run()) == rows(alone)
        assert bool(measured) == (name == "always")
    said = capfd.readouterr().err
    assert "on texts failed 3 times, by the process was ended by SIGKILL (on worker" in said


def test_what_is_known_is_not_handed_out(places, tmp_path, monkeypatch):
    study = comparison(places)
    sent = {
        part.what: sent for part, sent in zip(study.parts(), in_this_process(study), strict=True)
    }
    study.store.take(sent["whole model"])
    drawn = []
    monkeypatch.setattr(sharing, "drive", lambda _engine, ledger, *_, **__: drawn.append(ledger))
    share(near(study, workers=1))
    (ledger,) = drawn
    units = near(study).units
    waiting = [ledger.take("worker") for _ in units]
    assert waiting == [*units[1:], None]
    fewer = comparison(places, criteria=("deepest",))  # another comparison with a part in common
    fewer.store.take(sent["deepest"])
    assert all(is_known(fewer, part) for part in fewer.parts())


# What is refused.
def test_what_others_cannot_open_is_not_shared(places, tmp_path):
    for study, said in (
        (comparison(places, store=Store(None)), "leave out --no-cache"),
        (comparison(places, texts={"texts": documents(24)}), "name files or datasets"),
        (curve(places, tmp_path, criteria=("deepest",), store=Store(None)), "--no-cache"),
    ):
        with pytest.raises(ProcessesError, match=said):
            share(near(study))
    with pytest.raises(ProcessesError, match="how many processes"):
        share(near(comparison(places), workers=None))


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("versions", {"shallower": "0.9.9"}, r"has shallower 0\.\d+\.\d+, the driver 0\.9\.9"),
        ("texts", [{}, ""], "the texts here are not those of the driver"),
    ],
)
def test_a_worker_that_has_something_else_refuses(places, name, other, said):
    described = far(comparison(places))
    expects = {**described["expects"], name: other}
    with pytest.raises(ProcessesError, match=said):
        open_work({**described, "expects": expects})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": {"cpu": "other"}}, "the processors here are not those"),
        ({"model": {"sha256": "0"}}, "here is not the model of the driver"),
    ],
)
def test_a_worker_that_has_another_model_or_processor_refuses(places, change, said):
    described = far(comparison(places))
    identities = [{**one, **change} for one in described["identities"]]
    with pytest.raises(ProcessesError, match=said):
        open_work({**described, "identities": identities})


def test_entries_that_were_changed_are_refused(places):
    study = comparison(places, criteria=("deepest",))
    for entries in in_this_process(study)[-1:]:
        for table, found in entries.items():
            assert found
            changed = [*found[0][:3], found[0][3] + " ", found[0][4]]
            with pytest.raises(CacheError, match="an entry is damaged"):
                study.store.take({**entries, table: [*found[1:], changed]})
    assert study.store.usage() == [] or {kind for kind, *_ in study.store.usage()} == {"files"}
    with pytest.raises(CacheError, match="no entries"):
        study.store.take({"elsewhere": [["a", "b", 1, "{}", "c"]]})
