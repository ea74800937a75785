"""What lies beside a cut: a model card that is true and can be run, and other tools' own words."""

import json
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import shallower as sh
from shallower import cli
from shallower.cutting.cards import EXPORT_FILES, export_path, exports, hub_id, read_card
from shallower.cutting.gguf import gguf_files
from shallower.values.layers import blocks_of
from tests.conftest import tiny_llama
from tests.cutting.gguf_files import write
from tests.folders import tree
from tests.models.gguf_files import write_gguf

DROPPED = [1, 3, 4]
LICENSED = """---
license: other
license_name: own
license_link: LICENSE
language:
- en
- no
datasets: [a/b]
base_model: its/base
---
# Tiny

What its maker says.
"""


@pytest.fixture(scope="session")
def source(tmp_path_factory, words):
    """A folder of a random Llama of 6 layers with a model card."""
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    tiny_llama(initializer_range=0.2).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "README.md").write_text(LICENSED)
    return folder


def in_memory(source, out):
    model, tokenizer = sh.load_model(source)
    sh.save_model(model, tokenizer, out, sh.drop_layers(model, DROPPED))


def on_disk(source, out):
    sh.prune_checkpoint(source, DROPPED, out)


def blocks_of_code(card, language):
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)


def front(card):
    return ModelCard(card).data.to_dict()


@pytest.fixture
def shallower(monkeypatch, capfd):
    """Run a command in this process: its status, standard output and standard error."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["shallower", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capfd.readouterr()

    return call


def run_line(line, shallower):
    """Run a line of a shell."""
    program, *words = shlex.split(line)
    status, _, err = shallower(*words)
    assert (program, status) == ("shallower", 0), err


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# The card.
@pytest.mark.parametrize("cut", [in_memory, on_disk])
def test_what_a_card_tells_to_do_makes_the_cut_again(source, tmp_path, monkeypatch, shallower, cut):
    cut(source, tmp_path / "first")
    card = (tmp_path / "first" / "README.md").read_text()
    python, load = blocks_of_code(card, "python")
    command, _serve, _others = blocks_of_code(card, "sh")
    for name, make in (
        ("by_python", lambda: exec(python, {})),
        ("by_command", lambda: run_line(command, shallower)),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        make()
        assert_same_weights("cut", tmp_path / "first")
        assert Path("cut", "README.md").read_text() == card
    monkeypatch.chdir(tmp_path / "first")
    loaded = {}
    exec(load, loaded)
    assert loaded["model"].config.num_hidden_layers == 3
    assert loaded["tokenizer"]("w1 w2")["input_ids"] == [1, 2]


@pytest.mark.parametrize("cut", [in_memory, on_disk])
def test_the_license_and_the_text_of_the_source_are_carried_over(source, tmp_path, cut):
    cut(source, tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert front(card) == {
        "library_name": "transformers",
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "tags": ["shallower", "layer-pruning"],
    }
    assert card.endswith("\n## The card of the source\n\n# Tiny\n\nWhat its maker says.\n")
    assert card.count("\n---\n") == 1
    assert "# tiny without layers [1, 2) [3, 5)\n" in card
    assert "| kept | [0, 1) [2, 3) [5, 6), 3 of 6 layers |" in card
    assert "| why | manual: named by hand |" in card
    assert "not healed" in card


def test_a_cut_of_a_cut_keeps_both_cards(source, tmp_path):
    sh.prune_checkpoint(source, [1], tmp_path / "once")
    sh.prune_checkpoint(tmp_path / "once", [2], tmp_path / "twice")
    card = (tmp_path / "twice" / "README.md").read_text()
    titles = re.findall(r"^# .*$", card, re.MULTILINE)
    titles = [title for title in titles if title != "# Tiny"]
    assert titles == ["# once without layers [2, 3)", "# tiny without layers [1, 2)"]
    assert front(card)["license"] == "other"
    assert "What its maker says." in card


def test_a_license_is_not_invented(source, tmp_path):
    plan = sh.Plan(6, (sh.Block(1, 2),))
    for text in (
        None,
        "# No front matter\n",
        "---\nlicense: [broken\n---\ntext",
        "---\n- license\n---\ntext",
        "---\nlicense: {a: b}\n---\ntext",
        "---\nlicense: null\n---\ntext",
        "---\nlicense: " + "[" * 5000 + "\n---\ntext",
        "---\nnever closed\n",
        b"\xff\xfe\x00license: mit",
    ):
        path = tmp_path / "card"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        card = exports(plan, "tiny", "", source_card=path)["README.md"]
        assert "license" not in front(card), text
        assert ("## The card of the source" in card) == (text is not None)
    path.write_bytes(b"---\nlicense: mit\n---\n" + bytes(1 << 20))
    with pytest.warns(UserWarning, match="too large for a model card"):
        assert read_card(path) == ({}, "")


def test_keys_that_multiply_are_not_merged(tmp_path):
    lines = ["a0: &a0 {x: y}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n" + "\n".join(lines) + "\n---\ntext")
    assert read_card(path) == ({"license": "mit"}, "text")


def test_a_card_says_what_the_plan_knows(llama, words, tmp_path):
    texts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    scan = sh.scan(llama, words, texts, max_length=7)
    plan = scan.plan(2)
    loss = sh.evaluate_loss(llama, words, texts)
    card = exports(plan, "a/tiny", "", losses=(loss, loss))["README.md"]
    block = plan.blocks[0]
    assert front(card)["base_model"] == "a/tiny"
    assert f"# a/tiny without layers {block}\n" in card
    scored = f"{block}, angular distance {block.score:.4f} ± {block.stderr:.4f}"
    assert f"| removed | {scored} |" in card
    assert "| why | similarity: " in card
    assert "| calibration | 3 texts of at most 7 tokens |" in card
    assert f"| held-out loss | {loss} → {loss} nats a token, 6 tokens of 3 texts |" in card
    assert f"| source | {plan.model} |" in card
    for package, version in plan.versions.items():
        assert f"{package} {version}" in card
    assert "not measured" in exports(plan, "a/tiny", "")["README.md"]
    deepest = sh.Plan(6, (sh.Block(3, 5),), "deepest")
    assert "| why | deepest: " in exports(deepest, "a/tiny", "")["README.md"]


def test_a_run_writes_the_losses_that_it_measured(source, words, tmp_path):
    model, tokenizer = sh.load_model(source, dtype="float32")
    texts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    done = sh.run(model, tokenizer, texts, texts, tmp_path / "out", [1, 2])
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    after = {cut.block: cut.loss for cut in done.comparison.cuts}[done.plan.blocks[0]]
    assert f"| held-out loss | {done.comparison.base} → {after} nats a token" in card


@pytest.mark.parametrize(
    "name", ["a b", "it's", "a|b", "ä 三", "--drop", "a: b", "- a", "#a", "a\nb", "$(touch x)"]
)
def test_odd_names_break_nothing(name):
    plan = sh.Plan(6, (sh.Block(0, 1), sh.Block(3, 5)), versions={name: name})
    texts = exports(plan, name, "", gguf=name + ".gguf")
    command, _serve, others = blocks_of_code(texts["README.md"], "sh")
    words = ["shallower", "prune", name, "--drop", "0,3:5", "--out", name + ".gguf"]
    assert shlex.split(command) == words
    assert shlex.split(others)[1] == name + ".mergekit.yaml"
    assert yaml.safe_load(texts["mergekit.yaml"])["slices"][0]["sources"][0]["model"] == name
    assert front(texts["README.md"])["library_name"] == "gguf"
    (row,) = re.findall(r"^\| made with \| (.*) \|$", texts["README.md"], re.MULTILINE)
    assert row.replace("\\|", "|") == " ".join(f"{name} {name}".split())


def test_a_hub_id_is_told_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert hub_id("org/name-1.5B_x") == "org/name-1.5B_x"
    assert hub_id("gpt2") == "gpt2"
    assert hub_id("/root/hub/models--org--name/snapshots/0123") == "org/name"
    assert hub_id("models--gpt2/snapshots/0123") == "gpt2"
    for source in ("org/here", "./name", "/org/name", "a/b/c", "tiny.gguf", "", "a b"):
        assert hub_id(source) is None


# Other tools.
@given(st.integers(2, 40), st.sets(st.integers(0, 39), min_size=1))
def test_other_tools_are_told_the_same_layers(num_layers, drawn):
    dropped = {layer % num_layers for layer in drawn} - {num_layers - 1} or {0}
    plan = sh.Plan(num_layers, blocks_of(sorted(dropped)))
    texts = exports(plan, "a/tiny", "", dtype="bfloat16")
    listed = texts["prune_layers.txt"]
    assert [int(word) for word in listed.strip().split(",")] == sorted(dropped)
    assert f"--prune-layers {listed.strip()} source.gguf" in texts["README.md"]
    config = yaml.safe_load(texts["mergekit.yaml"])
    sources = [source for part in config.pop("slices") for source in part["sources"]]
    kept = [layer for source in sources for layer in range(*source["layer_range"])]
    assert kept == list(plan.survivors)
    assert {source["model"] for source in sources} == {"a/tiny"}
    assert config == {"merge_method": "passthrough", "dtype": "bfloat16"}


def test_mergekit_reads_its_config():
    """Where mergekit is installed, which the tests do not ask for."""
    config = pytest.importorskip("mergekit.config")
    plan = sh.Plan(6, (sh.Block(0, 1), sh.Block(3, 5)))
    for options in ({"dtype": "float32"}, {"dtype": "nf4"}, {"gguf": "cut.gguf"}):
        text = exports(plan, "a/tiny", "", **options)["mergekit.yaml"]
        read = config.MergeConfiguration.model_validate(yaml.safe_load(text))
        assert [part.sources[0].layer_range for part in read.slices] == [(1, 3), (5, 6)]
        assert read.dtype == (options["dtype"] if options.get("dtype") == "float32" else None)


def test_what_is_quantised_has_no_dtype_in_mergekit(source, tmp_path):
    on_disk(source, tmp_path / "plain")
    assert yaml.safe_load((tmp_path / "plain" / "mergekit.yaml").read_text())["dtype"] == "float32"
    plan = sh.Plan(6, (sh.Block(1, 2),))
    assert "dtype" not in yaml.safe_load(exports(plan, "a", "", dtype="nf4")["mergekit.yaml"])


# Files.
def test_a_plan_of_other_layers_is_not_saved_beside_a_model(llama, tmp_path):
    plan = sh.Plan(6, (sh.Block(1, 3),))
    with pytest.raises(sh.PlanError, match="leaves 4 layers, and the model has 6"):
        sh.save_model(llama, None, tmp_path / "cut", plan)
    assert list(tmp_path.iterdir()) == []
    sh.save_model(llama, None, tmp_path / "whole")
    assert not set(EXPORT_FILES) & {path.name for path in (tmp_path / "whole").iterdir()}


def dry_run(shallower, *words):
    status, out, err = shallower("prune", *words, "--dry-run", "--json")
    assert status == 0, err
    return json.loads(out)["write"]


def test_a_dry_run_names_every_file(source, tmp_path, shallower):
    words = (source, "--drop", "1,3:5", "--out", tmp_path / "cut")
    there = dry_run(shallower, *words, "--max-shard-size", "30KB")
    assert list(tmp_path.iterdir()) == []
    sh.prune_checkpoint(source, DROPPED, tmp_path / "cut", "30KB")
    assert sorted(there) == sorted(str(path) for path in (tmp_path / "cut").iterdir())

    patterns = dry_run(shallower, *words, "--dtype", "bfloat16", "--overwrite")
    in_memory(source, tmp_path / "memory")
    for path in (tmp_path / "memory").iterdir():
        assert any(path.match(Path(pattern).name) for pattern in patterns), path.name
    assert "would write" in shallower("prune", *words, "--overwrite", "--dry-run")[1]


def test_a_cut_gguf_has_its_files_beside_it(tmp_path, shallower):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "out" / "cut.gguf"
    (tmp_path / "README.md").write_text("# Of something else\n")
    words = (source, "--drop", "1,3:5", "--out", out)
    assert dry_run(shallower, *words) == [str(path) for path in gguf_files(out)]
    assert not out.parent.exists()
    sh.prune_gguf(source, DROPPED, out)
    assert set(out.parent.iterdir()) == set(gguf_files(out))
    card = export_path(out, "README.md").read_text()
    assert front(card) == {"library_name": "gguf", "tags": ["shallower", "layer-pruning"]}
    assert "Of something else" not in card
    assert export_path(out, "prune_layers.txt").read_text() == "1,3,4\n"

    for name, text in (("README.md", LICENSED), ("tiny.README.md", "---\nlicense: mit\n---\n")):
        (tmp_path / name).write_text(text)
        sh.prune_gguf(source, DROPPED, out, overwrite=True)
        expected = "mit" if name.startswith("tiny") else "other"
        assert front(export_path(out, "README.md").read_text())["license"] == expected


def test_what_a_card_of_a_gguf_tells_to_do_makes_the_cut_again(tmp_path, monkeypatch, shallower):
    source, first = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "first"
    sh.prune_gguf(source, [1, 2], first / "cut.gguf")
    card = (first / "cut.README.md").read_text()
    python, load = blocks_of_code(card, "python")
    command, _serve, _others = blocks_of_code(card, "sh")
    for name, make in (
        ("by_python", lambda: exec(python, {})),
        ("by_command", lambda: run_line(command, shallower)),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        make()
        assert tree(tmp_path / name) == tree(first)
    loaded = {}
    exec(load, loaded)
    assert loaded["model"].config.num_hidden_layers == 2


@pytest.mark.parametrize("index", range(1, 5))
def test_a_file_beside_a_gguf_is_not_replaced_unasked(tmp_path, shallower, index):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "cut.gguf"
    taken = gguf_files(out)[index]
    taken.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(sh.OutputError, match=f"{taken.name} exists already"):
        sh.prune_gguf(source, DROPPED, out)
    status, _, err = shallower("prune", source, "--drop", "1", "--out", out, "--dry-run")
    assert status == 2
    assert f"{taken.name} exists already" in err
    assert tree(tmp_path) == before
    sh.prune_gguf(source, DROPPED, out, overwrite=True)
    assert taken.read_bytes() != b"mine"
    taken.unlink()
    taken.mkdir()
    before = tree(tmp_path)
    with pytest.raises(sh.OutputError, match="is a folder"):
        sh.prune_gguf(source, DROPPED, out, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_gguf_that_fails_midway_leaves_all_as_it_was(tmp_path, overwrite):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "cut.gguf"
    if overwrite:
        sh.prune_gguf(source, [0], out)
    before = tree(tmp_path)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sh.prune_gguf(source, DROPPED, out, overwrite, progress=stop)
    assert tree(tmp_path) == before
    broken = sh.Plan(6, (sh.Block(1, 2),), versions={"made by": object()})
    with pytest.raises(TypeError):
        sh.prune_gguf(source, [1], out, overwrite, plan=broken)
    assert tree(tmp_path) == before


# The logits of a cut GGUF file.
def test_a_cut_gguf_is_verified(tmp_path, shallower):
    source, out = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cut.gguf"
    words = ("prune", source, "--drop", "1", "--verify", "--out")
    status, printed, err = shallower(*words, out, "--json")
    assert status == 0, err
    assert 0 <= json.loads(printed)["max_logits_difference"] <= 1e-5
    status, printed, err = shallower(*words, source, "--overwrite")
    assert status == 0, err
    assert "logits differ by at most" in printed
    assert source.read_bytes() == out.read_bytes()


def test_a_gguf_of_other_layers_is_told_from_the_cut(tmp_path):
    source, out = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "cut.gguf"
    model, tokenizer = sh.load_model(source, "float32")
    sh.prune_gguf(source, [1], out)
    assert sh.verify_checkpoint(model, tokenizer, out, [sh.Block(1, 2)], "the fox") <= 1e-5
    with pytest.raises(sh.ModelError, match=r"cut\.gguf is not the model with its layers skipped"):
        sh.verify_checkpoint(model, tokenizer, out, [sh.Block(2, 3)], "the fox")


def test_a_gguf_that_transformers_cannot_load_is_refused_before_the_cut(tmp_path, shallower):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "cut.gguf"
    status, _, err = shallower("prune", source, "--drop", "1", "--out", out, "--verify")
    assert status == 2
    assert "cannot load" in err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
