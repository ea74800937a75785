"""Results and records that were changed or forged: never taken for the same."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shallower.errors import OutputError
from shallower.store import again
from tests.cli.changes import change_at_random
from tests.cli.results import CALLS, edited, hashed, record_in
from tests.cli.results import given as given
from tests.cli.results import made as made
from tests.cli.results import place as place
from tests.conftest import mostly_slow


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", mostly_slow(CALLS, {"prune", "prune into a GGUF file"}))
@pytest.mark.parametrize("changes", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_no_change_is_taken_for_the_same(shallower, made, tmp_path, monkeypatch, name, changes):
    """A byte or a file of the result, or a value of its record, of a hundred each kind."""
    result, told = made(name)
    whole = Path.cwd().rename(Path.cwd().with_name(f"whole {name} {changes}"))

    def refuse(_):
        raise OutputError("it would be made")

    monkeypatch.setattr(again, "working_folder", refuse)
    for seed in range(changes):
        here = tmp_path / f"changed {seed}"
        shutil.copytree(whole, here, symlinks=True)
        monkeypatch.chdir(here)
        changed = change_at_random(random.Random(f"{name} {seed}"))
        done = shallower("reproduce", result, *told)
        assert done.status in (1, 2), changed
        assert "\nthe same" not in done.out, changed
        assert done.out.count("\n") > 1 or done.error, changed
        # The results on a card may grow: after all else it is not compared.
        assert "it would be made" not in done.err or "README.md" in changed
        shutil.rmtree(here)


ELSEWHERE = {"threads": "64", "cpu": "another"}


@pytest.mark.parametrize(("noise", "status"), [(1e-4, 0), (1.0, 1)])
def test_on_another_machine_the_weights_of_the_result_are_measured(
    shallower, made, monkeypatch, noise, status
):
    """Their hash in the record, and so the record of another machine, prove nothing."""
    result, told = made("patch")
    path = Path(result) / "model.safetensors"
    weights = load_file(path)
    source = torch.Generator().manual_seed(0)
    for name, one in weights.items():
        weights[name] = one + noise * torch.randn(one.shape, generator=source).to(one.dtype)
    save_file(weights, path, {"format": "pt"})
    hashed(result)
    edited(result, lambda record: record["machine"].update(ELSEWHERE))
    done = shallower("reproduce", result, *told)
    assert done.status == status, done.out + done.err
    first, last, *kept = done.out.splitlines()
    assert first == (
        "promised: the same losses within 0.02 nats a token: not with the same processor, threads"
    )
    if status:
        assert last.startswith("result: made: ")
        assert " nats measured on its weights, 1." in last
        assert kept[0].startswith("what was made again stays in")
        return
    num = len(record_in(result)[1]["files"])
    assert last == f"the same: {num - 1} of {num} files to the byte; 3 figures within 0.02 nats"
    # The record alone has no weights to be measured.
    alone = record_in(result)[0].rename("alone.json")
    done = shallower("reproduce", alone, *told)
    assert (done.status, done.out.splitlines()[1]) == (
        1,
        "the same but for 1 file that could not be compared: model.safetensors (other "
        "versions, processors or names of the source write another one)",
    )


def saved_by_another(config):
    """Spoils a config: another transformers has saved all, with one more value."""

    def edit(path):
        for one in path.parent.rglob("*"):
            if one.suffix in (".json", ".md") and "record" not in one.name:
                one.write_text(one.read_text().replace(again.versions()["transformers"], "5.0"))
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))

    return edit


def with_other_words(old, new, count=-1):
    """Spoils a file: other words stand in it."""
    return lambda path: path.write_text(path.read_text().replace(old, new, count))


@pytest.mark.parametrize(
    ("name", "file", "spoil", "line"),
    [
        ("prune", "config.json", saved_by_another({}), None),
        (
            "prune",
            "config.json",
            saved_by_another({"rms_norm_eps": 0.5}),
            "made again: config.json has other bytes",
        ),
        (
            "prune",
            "tokenizer_config.json",
            with_other_words('"tokenizer_class"', '"chat_template": "EVIL", "x"'),
            "made again: tokenizer_config.json has other bytes",
        ),
        (
            "patch",
            "shallower_patch.json",
            with_other_words('"patched": 1.', '"patched": 0.'),
            "result: shallower_patch.json: patched: 0.",
        ),
        (
            "patch",
            "shallower_patch.json",
            with_other_words('"patched": 1.', '"patched": [1], "x": 1.'),
            "result: ",
        ),
    ],
)  # fmt: skip
def test_a_record_is_not_believed_of_what_a_file_says(
    shallower, place, made, name, file, spoil, line
):
    """The hashes are those of the forged file; names and versions may be others."""
    result, told = made(name)
    spoil(Path(result) / file)
    if '"5.0"' in (Path(result) / "config.json").read_text():
        edited(result, lambda record: record["versions"].update(transformers="5.0"))
    hashed(result)
    Path(told[0].partition("=")[2]).rename("twin")
    done = shallower("reproduce", result, "--model=twin", *told[1:])
    assert done.status == (line is not None), done.out + done.err
    assert done.out.splitlines()[1].startswith(line or "the same: 4 of 10 files to the byte")


def forged(edit):
    return lambda path: edited(path.parent, edit)


BAD = {
    "no record": (lambda path: path.unlink(), "no record of shallower can be read at made/"),
    "another tool": (lambda path: path.write_text("{}"), "it is of another tool"),
    "a later version": (
        with_other_words('"version": 2', '"version": 3'),
        "it is of version 3: update shallower",
    ),
    "an earlier version": (
        with_other_words('"version": 2', '"version": 1'),
        "it is of an earlier version, without a hash of its own: make the result again",
    ),
    "an unknown option": (
        forged(lambda record: record["settings"].update(drip=1)),
        "the record names options that there are not: drip",
    ),
    "an unknown command": (
        forged(lambda record: record.update(command="cache")),
        "the record is of a command that leaves none: cache",
    ),
    "a plan of another name": (
        with_other_words('"plans": {}', '"plans": {"../../escaped": "x"}'),
        "it names what no command reads",
    ),
    "another thing read": (
        with_other_words('"model": {', '"out": {', 1),
        "it names what no command reads",
    ),
    "a thing without a hash": (
        forged(lambda record: record["read"]["model"].update(files={})),
        "what was read has no hash",
    ),
    "a result elsewhere": (
        with_other_words('"out": "made"', '"out": ".."'),
        "'..' is no name of a result",
    ),
    "what changes no result": (
        forged(lambda record: record["settings"].update(dry_run=True)),
        "its settings name places, or what changes no result (dry_run)",
    ),
    "a place as a repository": (
        forged(
            lambda record: record["read"]["model"].update(
                name=str(Path("tiny").resolve()), commit="c"
            )
        ),
        "tiny' is no repository of the hub",
    ),
    "a file as a dataset": (
        forged(
            lambda record: record["read"].update(
                texts={"name": "/etc/hosts", "commit": "", "files": {}, "count": 1}
            )
        ),
        "'/etc/hosts' is no repository of the hub",
    ),
    "another option than the call's": (
        forged(lambda record: record["settings"].update(drop="3:5")),
        "the settings of the record are not those of its call: shallower prune tiny --drop 2:4",
    ),
    "another call": (
        forged(lambda record: record.update(call="shallower prune tiny --drop 1:3 --out made")),
        "the settings of the record are not those of its call: shallower prune tiny --drop 1:3",
    ),
    "a list of experts in a file": (
        forged(lambda record: record["settings"].update(drop_experts="/etc/passwd")),
        "its settings name a file of this machine: /etc/passwd",
    ),
    "a GGUF file elsewhere": (
        forged(lambda record: record["settings"].update(gguf_file="../small.gguf")),
        "its settings name a file of this machine: ../small.gguf",
    ),
    "a part that there is not": (
        forged(lambda record: record.update(part="more", files={}, said={})),
        "no result has a part 'more' of 0 files",
    ),
    "a figure that is no number": (
        forged(lambda record: record["figures"].update(x=float("nan"))),
        "a figure is not finite",
    ),
    "a place": (
        forged(lambda record: record["settings"].update(plan="cut")),
        "its settings name places, or what changes no result (plan)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_record_that_is_none_is_refused(shallower, made, name):
    result, told = made("prune")
    spoil, said = BAD[name]
    spoil(record_in(result)[0])
    assert said in shallower("reproduce", result, *told).error
