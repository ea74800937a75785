"""Folders of task files and their data, of the words of the tests' tokenizer."""

import json

import numpy as np
import yaml


def sentence(rng, low, high):
    return " ".join(f"w{i}" for i in rng.integers(0, 97, rng.integers(low, high)))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def choices(number=40, seed=0, options=4):
    """Rows of a task of multiple choice."""
    rng = np.random.default_rng(seed)
    return [
        {
            "query": sentence(rng, 1, 30),
            "choices": [sentence(rng, 1, 6) for _ in range(options)],
            "answer": int(rng.integers(options)),
        }
        for _ in range(number)
    ]


CHOICE = {
    "task": "pick",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"validation": "pick.jsonl"}},
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}

LAST = {
    "task": "last",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "last.jsonl"}},
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + continuation}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}

SAID = {
    "task": "said",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "said.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "generation_kwargs": {"until": ["w3"], "max_gen_toks": 5, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}

PARTS = {
    **CHOICE,
    "task": "parts",
    "dataset_kwargs": {"data_files": {"validation": "parts.jsonl"}},
    "metadata": {"version": 1, "split_by": "subject"},
}


def write_tasks(folder, *tasks):
    """Task files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        (folder / f"{task.get('task') or task['group']}.yaml").write_text(yaml.safe_dump(task))
    return folder
