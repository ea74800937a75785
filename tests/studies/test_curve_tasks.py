"""Tasks on the cuts of a comparison."""

import json
from functools import partial
from importlib.metadata import version

import pytest

import shallower as sh
from shallower.reporting.stories.comparison import comparison_story
from shallower.studies import compare_rows, measures
from shallower.values import provenance
from tests.healing.cuts import documents as progressions

pytest.importorskip("lm_eval")
from shallower.evaluation.tasks import evaluate_tasks

TEXTS, REPORT = progressions(120, 5), progressions(12, 1)
TAKEN = {
    "eval_texts": REPORT, "max_length": 16, "n": [2], "patch_tokens": 512,
    "criteria": ["deepest"], "tasks": ["next"],
}  # fmt: skip
TASK = """\
task: next
dataset_path: json
dataset_kwargs:
  data_files:
    test: next.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


SAID = """\
task: said
dataset_path: json
dataset_kwargs:
  data_files:
    test: said.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["w3"]
  max_gen_toks: 1
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a task of 16 items: which word comes next, of two."""
    items = []
    for number, text in enumerate(progressions(200, 9)):
        *begin, last = text.split()
        if len(begin) > 3 and len(items) < 16:
            options = [last, "w3"] if number % 2 else ["w3", last]
            items.append({"text": " ".join(begin), "options": options, "answer": 1 - number % 2})
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "next.yaml").write_text(TASK)
    (place / "next.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return place


def test_every_point_has_the_main_measure_of_every_task(learned, words, tmp_path, folder):
    curve = sh.curve(learned, words, TEXTS, **TAKEN, tasks_dir=folder, out=tmp_path / "out")
    measured = (*curve.models, *curve.rows)
    assert {task.metric for one in measured for task in one.tasks} == {"acc_norm"}
    whole, cut, patched = (one.task("next").by_item.sums.tolist() for one in measured)

    def plain():
        return evaluate_tasks(learned, words, ["next"], tasks_dir=folder)[0].by_item.sums.tolist()

    assert whole == plain()
    with sh.without_layers(learned, [1, 2]):
        assert cut == plain()
    assert len(patched) == 16
    story = comparison_story(curve, drawn=False)
    titles = [table.title for section in story.sections for table in section.tables]
    assert titles[2].startswith("next, as bare cuts: acc_norm in %, whole model ")
    header, *rows = (tmp_path / "out" / "comparison.csv").read_text().splitlines()
    assert header.endswith("next,next_stderr,next_difference,next_difference_stderr")
    assert float(rows[0].split(",")[-4]) == curve.models[0].task("next").mean


def test_other_items_are_another_curve(learned, words, tmp_path, folder, monkeypatch):
    options = {**TAKEN, "states": ["cut"], "tasks_dir": folder, "out": tmp_path / "out"}
    first = sh.curve(learned, words, TEXTS, **options)
    with monkeypatch.context() as patched:
        patched.setattr(compare_rows, "open_measuring", lambda *_args, **_options: 1 / 0)
        assert sh.curve(learned, words, TEXTS, **options) == first
    items = (folder / "next.jsonl").read_text().splitlines()
    (folder / "next.jsonl").write_text("\n".join(items[1:]) + "\n")
    with pytest.raises(sh.OutputError, match=r"comparison\.json exists already"):
        sh.curve(learned, words, TEXTS, **options)


def test_scores_on_tasks_with_a_file_that_is_unreadable_are_not_those_of_no_tasks(
    learned, words, tmp_path, folder, monkeypatch
):
    options = {**TAKEN, "states": ["cut"], "tasks_dir": folder}
    sh.curve(learned, words, TEXTS, **{**options, "tasks": []}, out=tmp_path / "bare")

    def unreadable(*_):
        raise PermissionError("notes.txt")

    monkeypatch.setattr(measures, "hash_of_files", unreadable)
    curve = sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")
    assert [len(one.tasks) for one in (*curve.models, *curve.rows)] == [1, 1]


def test_another_lm_eval_is_another_curve_and_is_told(
    learned, words, tmp_path, folder, monkeypatch
):
    options = {**TAKEN, "states": ["cut"], "tasks_dir": folder, "out": tmp_path / "out"}
    curve = sh.curve(learned, words, TEXTS, **options)
    assert curve.versions["lm_eval"] == version("lm_eval")
    page = comparison_story(curve, drawn=False)
    assert any(f"lm-eval: version {version('lm_eval')}" in x for x in page.sections[-1].lines)
    known = provenance._version
    monkeypatch.setattr(
        provenance, "_version", lambda name: "9" if name == "lm_eval" else known(name)
    )
    with pytest.raises(sh.OutputError, match=r"comparison\.json exists already"):
        sh.curve(learned, words, TEXTS, **options)


def _without_its_own(manager, *, include_path, include_defaults):
    return manager(include_path=include_path, include_defaults=False)


@pytest.mark.slow
def test_sampled_answers_are_a_task_of_their_own(learned, words, tmp_path, folder):
    (folder / "said.yaml").write_text(SAID)
    texts = [text.split() for text in progressions(40, 9)]
    items = [{"text": " ".join(one[:4]), "answer": one[4]} for one in texts if len(one) > 4]
    (folder / "said.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    options = {**TAKEN, "states": ["cut"], "tasks_dir": folder, "tasks": ["said", "next"]}
    curve = sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out", pass_at=3)
    for one in (*curve.models, *curve.rows):
        assert [task.task for task in one.tasks] == ["said", "said sampled", "next"]
        assert one.task("said sampled").metric == "pass@3"
    expected = evaluate_tasks(learned, words, ["said"], tasks_dir=folder, pass_at=3)
    assert curve.models[0].task("said sampled").mean == expected[-1].mean
    assert len({round(one.mean, 3) for one in expected}) > 1
    with pytest.raises(sh.OutputError, match=r"comparison\.json exists already"):
        sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out", pass_at=2)


def test_a_task_that_is_not_there_is_refused_before_the_model_is_loaded(
    tmp_path, folder, monkeypatch
):
    from lm_eval import tasks

    monkeypatch.setattr(  # an index of all its tasks takes seconds
        tasks, "TaskManager", partial(_without_its_own, tasks.TaskManager)
    )
    source = sh.ModelSource(tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(sh.TextsError, match="no task nothing"):
        sh.curve(
            source, None, TEXTS, **{**TAKEN, "tasks": ["nothing"]}, tasks_dir=folder,
            out=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
