"""The text of a model card: true, complete, and of nobody's folders."""

import itertools
import math
import re

import pytest
from huggingface_hub import ModelCard

import shallower as sh
from shallower.cutting.cards import adapters_card, healed_card, state_loss
from shallower.cutting.exports import EXPORT_FILES, export_files
from shallower.cutting.metadata import front_matter, loss_results, without_results
from shallower.cutting.source import UncutModel, find_source, read_card
from shallower.reporting.results import check_results, state_results
from shallower.values.experts import DroppedExperts
from tests.conftest import mostly_slow, tiny_llama
from tests.cutting.card_tools import (
    DROPPED,
    LICENSED,
    blocks_of_code,
    front,
    history,
    in_memory,
    on_disk,
    tell_no_paths,
    texts_of,
)
from tests.cutting.mixtures import mixture, some_experts


@pytest.fixture(scope="session")
def source(tmp_path_factory, words):
    """A folder of a random Llama of 6 layers with a model card and a license."""
    folder = tmp_path_factory.mktemp("cards") / "tiny"
    tiny_llama(initializer_range=0.2).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "README.md").write_text(LICENSED)
    (folder / "LICENSE").write_text("Do as you like.")
    (folder / "NOTICE.txt").write_text("By its maker.")
    return folder


@pytest.mark.parametrize("cut", [in_memory, on_disk])
def test_the_license_and_the_text_of_the_source_are_carried_over(source, tmp_path, cut):
    cut(source, tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert front(card) == {
        "base_model": "its/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text2text-generation",
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "tags": ["legal", "shallower", "layer-pruning"],
    }
    assert card.endswith("\n## The card of the source\n\n# Tiny\n\nWhat its maker says.\n")
    assert card.count("\n---\n") == 1
    assert "# tiny without layers [1, 2) [3, 5)\n" in card
    assert "| kept | [0, 1) [2, 3) [5, 6), 3 of 6 layers |" in card
    assert "| why | manual: named by hand |" in card
    assert "not healed" in card
    assert (tmp_path / "cut" / "LICENSE").read_text() == "Do as you like."
    assert (tmp_path / "cut" / "NOTICE.txt").read_text() == "By its maker."


TOLD = ("shallower_patch.json", "healing.json", "healing.png", "eval.json", "mergekit.yaml", "job")


def test_a_card_tells_the_whole_chain(source, tmp_path):
    sh.prune(source, [1], tmp_path / "once")
    model, tokenizer = sh.load_model(tmp_path / "once", dtype="float32")
    plan = sh.drop_layers(model, [3])
    losses = tuple(sh.Loss(nats, 0.1, 90, 9, 0, 99) for nats in (4.0, 4.25))
    done = sh.Patch(plan, "feed_forward", 90, 10, 1.0, 3.0, 2.0)
    named = {"whole": losses[0], "cut": losses[1], "patched": losses[1]}
    sh.save_patched(model, tokenizer, tmp_path / "pk", done=done, losses=named)
    for name in TOLD:
        (tmp_path / "pk" / name).write_bytes(b"{}")
    sh.prune(tmp_path / "pk", [0], tmp_path / "again")
    there = {name: (tmp_path / "again" / name) for name in TOLD}
    assert [name for name, file in there.items() if file.exists()] == ["mergekit.yaml"]
    assert there["mergekit.yaml"].read_bytes() != b"{}"
    card = (tmp_path / "again" / "README.md").read_text()
    source_step, once, second, patched, again = steps = history(card)
    assert source_step == "`tiny`, 6 layers"
    assert once == "cut: without layers [1, 2), 5 of 6 layers stay"
    assert second == "cut: without layers [3, 4), 4 of 5 layers stay"
    assert patched.startswith("matrices beside it were solved anew by least squares; ")
    lost = "; held-out loss 4.000 ± 0.100 → 4.250 ± 0.100 nats a token, 90 tokens of 9 texts"
    assert patched.endswith(lost)
    assert again == "cut: without layers [0, 1), 3 of 4 layers stay"
    # Healed, with what is said of its source left alone; and cut once more.
    rows = [("steps", "9"), ("loss of the selection set", "4.1 nats a token")]
    path, command = tmp_path / "again" / "README.md", "shallower heal cut --merge --out healed"
    path.write_text(healed_card(path, "adapters were trained.", rows, command=command))
    own, _, of_source = path.read_text().partition("## The card of the source")
    assert card.endswith(of_source)
    assert "| held-out loss | not measured" in own
    assert own.count("shallower heal cut") == 1
    steps += ["adapters were trained; loss of the selection set: 4.1 nats a token"]
    assert history(own) == steps
    state_loss(path, losses)
    sh.prune(tmp_path / "again", [1], tmp_path / "last")
    steps[-1] += lost
    steps += ["cut: without layers [1, 2), 2 of 3 layers stay"]
    assert history((tmp_path / "last" / "README.md").read_text()) == steps


def test_a_license_is_not_invented(tmp_path):
    plan = sh.Plan(6, (sh.Block(1, 2),))
    for text in (
        None,
        "# No front matter\n",
        "---\nlicense: [broken\n---\ntext",
        "---\n- license\n---\ntext",
        "---\nlicense: {a: b}\n---\ntext",
        "---\nlicense: null\n---\ntext",
        "---\nlicense: " + "[" * 1000 + "\n---\ntext",
        "---\nnever closed\n",
        b"\xff\xfe\x00license: mit",
    ):
        path = tmp_path / "card"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        inherited, below = read_card(path)
        source = UncutModel("tiny", inherited=inherited, text=below)
        card = texts_of(plan, source)["README.md"]
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


def test_front_matter_names_the_nearest_ancestor_and_keeps_tags_once():
    def read(inherited, base, relation="finetune"):
        lines = front_matter(inherited, base=base, relation=relation, library="x", tags=["lora"])
        return front(f"---\n{lines}---\n")

    assert read({}, None) == {
        "library_name": "x",
        "pipeline_tag": "text-generation",
        "tags": ["shallower", "layer-pruning", "lora"],
    }
    assert read({"base_model": "its/base"}, "a/b")["base_model"] == "a/b"
    assert read({"base_model": ["one/a", "two/b"]}, None)["base_model"] == ["one/a", "two/b"]
    assert read({}, "a/b", "adapter")["base_model_relation"] == "adapter"
    assert read({"tags": "lora"}, None)["tags"] == ["lora", "shallower", "layer-pruning"]


def test_a_card_says_what_the_plan_knows(llama, words):
    texts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    scan = sh.scan(llama, words, texts, max_length=7)
    plan = scan.plan(2)
    loss = sh.evaluate_loss(llama, words, texts)
    card = texts_of(plan, losses=(loss, loss))["README.md"]
    block = plan.blocks[0]
    assert front(card)["base_model"] == "a/tiny"
    assert f"# a/tiny without layers {block}\n" in card
    scored = f"{block}, angular distance {block.score:.4f} ± {block.stderr:.4f}"
    assert f"| removed | {scored} |" in card
    assert "| why | similarity: " in card
    assert "| doubt | Distance is not loss: shallower run MODEL --n " in card
    assert "| calibration | 3 texts of at most 7 tokens |" in card
    assert f"| held-out loss | {loss} → {loss} nats a token, 6 tokens of 3 texts |" in card
    assert f"| source | {plan.model} |" in card
    assert "model-index" not in front(texts_of(plan)["README.md"])
    for package, version in plan.versions.items():
        assert f"{package} {version}" in card
    assert "not measured" in texts_of(plan)["README.md"]
    deepest = sh.Plan(6, (sh.Block(3, 5),), "deepest")
    assert "| why | deepest: " in texts_of(deepest)["README.md"]


TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


def test_losses_stand_where_the_hub_looks_for_results(llama, words, tmp_path):
    plan = sh.Plan(6, (sh.Block(1, 2),))
    before = sh.evaluate_loss(llama, words, TEXTS)
    with sh.without_layers(llama, plan):
        after = sh.evaluate_loss(llama, words, TEXTS)
    card = texts_of(plan, losses=(before, after), tested="org/wiki:en:test")["README.md"]
    read = ModelCard(card).data
    assert read.model_name == "a/tiny without layers [1, 2)"
    loss, bits, more = read.eval_results
    for one in (loss, bits, more):
        assert (one.task_type, one.dataset_type) == ("text-generation", "org/wiki")
        assert (one.dataset_config, one.dataset_split) == ("en", "test")
    assert loss.metric_value == pytest.approx(after.nats, abs=1e-6)
    assert loss.metric_args == {"stderr": round(after.stderr, 6)}
    assert loss.metric_name == f"{after} nats a token, 3 texts"
    assert bits.metric_value == pytest.approx(after.bits_per_byte, abs=1e-6)
    paired = after.minus(before)
    assert more.metric_value == pytest.approx(paired.mean, abs=1e-6)
    assert more.metric_args == {"stderr": round(paired.stderr, 6)}
    # Of a file its name alone, and of texts without a name none.
    (tmp_path / "own.txt").write_text("w1")
    names = {"": "held-out", str(tmp_path / "own.txt"): "own.txt", "own.txt": "own.txt"}
    for tested, name in names.items():
        card = texts_of(plan, losses=(before, after), tested=tested)["README.md"]
        assert {one.dataset_type for one in ModelCard(card).data.eval_results} == {name}
        assert str(tmp_path) not in card
    one = texts_of(plan, losses=(sh.Loss(4.0, math.nan, 2, 1, 0, 99),) * 2)["README.md"]
    (alone,) = ModelCard(one).data.eval_results
    assert (alone.metric_name, alone.metric_args) == ("4.000 nats a token, 1 text", None)


def test_results_are_of_the_model_that_has_the_card(llama, words, tmp_path):
    plan = sh.Plan(6, (sh.Block(1, 2),))
    loss = sh.evaluate_loss(llama, words, TEXTS)
    path = tmp_path / "README.md"
    path.write_text(texts_of(plan, losses=(loss, loss), tested="org/wiki:test")["README.md"])
    body = ModelCard(path.read_text()).text
    # A healing without a test set has none; one that is measured later has its own.
    healed = healed_card(path, "adapters were trained.", [], command="shallower heal cut --out x")
    assert "model-index" not in front(healed)
    path.write_text(healed)
    state_loss(path, (loss, sh.Loss(3.5, 0.1, 6, 3, 0, 99)), tested="org/wiki:test")
    (own,) = ModelCard(path.read_text()).data.eval_results
    assert (own.metric_value, own.dataset_type) == (3.5, "org/wiki")
    # A measure anew takes the place of the old, and others stay, as does all else.
    path.write_text(texts_of(plan, losses=(loss, loss), tested="org/wiki:test")["README.md"])
    state_results(path, loss_results(sh.Loss(2.5, 0.1, 6, 3, 0, 99), None, "org/wiki:test"))
    state_results(path, loss_results(sh.Loss(1.5, 0.1, 6, 3, 0, 99), None, "mine.jsonl"))
    read = ModelCard(path.read_text())
    assert read.text == body
    found = [(one.dataset_type, one.metric_type) for one in read.data.eval_results]
    assert sorted(found) == [
        ("mine.jsonl", "loss"), ("org/wiki", "bits_per_byte"), ("org/wiki", "loss"),
        ("org/wiki", "loss_increase"),
    ]  # fmt: skip
    # A cut of this one inherits no result.
    again = texts_of(plan, UncutModel("x", inherited=read_card(path)[0]))["README.md"]
    assert "model-index" not in front(again)


@pytest.mark.parametrize(
    ("front", "why"),
    [
        ("model-index: 3", "model-index is not a list of one model"),
        ("model-index: [{name: x}]", "its model-index cannot be read"),
        ("model-index:\n- {name: x, results: []}\n- {name: y, results: []}", "of one model"),
        ("license: mit\n? model-index\n: [{name: x, results: []}]", "write it as a block"),
        ("- license", "has no keys"),
        ("license: [", "no YAML"),
        ("a: &a {b: c}\nd: {<<: *a}", "merges keys"),
    ],
)
def test_a_card_that_cannot_be_read_gets_no_results(tmp_path, front, why):
    path = tmp_path / "README.md"
    path.write_text(f"---\n{front}\n---\n\n# Mine\n")
    for write in (check_results, lambda card: state_results(card, ())):
        with pytest.raises(sh.OutputError, match=why):
            write(path)
    assert path.read_text() == f"---\n{front}\n---\n\n# Mine\n"
    with pytest.raises(sh.OutputError, match="there is no card"):
        check_results(tmp_path / "none" / "README.md")
    # A healing that has trained for hours still gets its card.
    healed = healed_card(path, "adapters were trained.", [], command="shallower heal cut --out x")
    assert "This model is healed" in healed


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_results_change_nothing_else_of_a_card(tmp_path, ends):
    """Not what YAML reads as another word, nor a comment."""
    lines = ["# see the hub's page of cards", "language: no", "version: 1.10", "widget: 'a << b'"]
    behind = ["# Mine", "", "Text."]
    path = tmp_path / "README.md"
    for given in (lines, []):
        card = ends.join(["---", *given, "---", "", *behind, ""]) if given else ends.join(behind)
        path.write_bytes(card.encode("utf-8-sig"))
        for nats in (2.5, 1.5):
            state_results(path, loss_results(sh.Loss(nats, 0.1, 6, 3, 0, 99), None, "mine.jsonl"))
        text = path.read_bytes().decode()
        assert without_results(text) == card
        data = ModelCard(text).data
        assert (data.model_name, data.eval_results[0].metric_value) == ("Mine", 1.5)
        assert text.endswith(ends.join(behind) + ends * bool(given))
    # Where they stood between other keys, these stay.
    middle = "---\na: 1\nmodel-index:\n- name: x\n  results: []\n\n# of b\nb: 2\n---\n"
    assert without_results(middle) == "---\na: 1\n\n# of b\nb: 2\n---\n"


def test_a_folder_saved_by_version_4_is_loaded_by_both(source, tmp_path):
    import json

    on_disk(source, tmp_path / "cut")
    assert "rope_parameters" in (tmp_path / "cut" / "README.md").read_text()
    config = json.loads((source / "config.json").read_text())
    config |= {"transformers_version": "4.57.1", "rope_theta": 10000.0}
    del config["rope_parameters"]
    old = tmp_path / "old"
    old.mkdir()
    for file in source.iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    (old / "config.json").write_text(json.dumps(config))
    on_disk(old, tmp_path / "old-cut")
    assert "rope_parameters" not in (tmp_path / "old-cut" / "README.md").read_text()


def test_a_card_of_a_model_with_its_own_code_says_so(llama, tmp_path):
    own = type("Own", (type(llama),), {"__module__": "transformers_modules.own"})
    llama.__class__ = own
    sh.save_model(llama, None, tmp_path / "cut", plan=sh.drop_layers(llama, DROPPED))
    card = (tmp_path / "cut" / "README.md").read_text()
    command, python = (blocks_of_code(card, language)[0] for language in ("sh", "python"))
    assert "--dtype float32 --trust-remote-code --out cut" in command
    assert "dtype='float32', trust_remote_code=True)" in python
    assert (
        blocks_of_code(card, "python")[1].count('from_pretrained(".", trust_remote_code=True)') == 2
    )
    assert "vllm serve . --trust-remote-code\n" in card
    plan, cut = sh.Plan(6, (sh.Block(1, 2),)), find_source(tmp_path / "cut")
    card = adapters_card(plan, cut, rows=[("steps", "9")], trust_remote_code=True)
    assert '.from_pretrained(".", trust_remote_code=True)' in card
    assert "`shallower merge . --trust-remote-code --out ../healed`" in card


def test_a_healed_card_is_written_into_any_card_or_none(tmp_path):
    path = tmp_path / "README.md"
    rows = [("steps", "9 | 10")]
    path.write_text("---\nlicense: mit\n---\n# Mine\n")
    card = healed_card(path, "adapters were trained.", rows)
    assert front(card)["license"] == "mit"
    assert card.index("This model is healed") < card.index("# Mine")
    assert "| steps | 9 \\| 10 |" in card
    path.unlink()
    card = healed_card(path, "adapters were trained.", rows)
    assert front(card)["tags"] == ["shallower", "layer-pruning"]


def test_the_card_of_adapters_names_the_cut_and_carries_its_license(source, tmp_path):
    plan = sh.Plan(6, (sh.Block(1, 2),))
    card = adapters_card(plan, find_source(source), rows=[("steps", "9")])
    assert front(card) == {
        "library_name": "peft",
        "pipeline_tag": "text2text-generation",
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "tags": ["legal", "shallower", "layer-pruning", "lora"],
    }
    assert "# Healing of tiny\n" in card
    assert str(source) not in card
    assert str(source.parent) not in card


@pytest.fixture
def mixed(tmp_path, words):
    folder = tmp_path / "of" / "somebody" / "mix"
    sh.save_model(mixture("mixtral"), words, folder)
    return folder


@pytest.mark.parametrize(
    ("layers", "options"),
    mostly_slow(
        itertools.product([(), [2, 3]], [{}, {"dtype": "float16"}]),
        [([2, 3], {"dtype": "float16"})],
    ),
)
def test_a_card_makes_the_cut_again(mixed, tmp_path, carried_out, layers, options):
    first = tmp_path / "first"
    dropped = {k: some for k, some in some_experts(mixture("mixtral")).items() if k not in layers}
    plan = sh.prune(mixed, layers, first, experts=dropped, **options)
    beside = {path.name for path in first.iterdir()} & {*EXPORT_FILES, "shallower_plan.json"}
    assert beside == {"README.md", "shallower_plan.json"}
    card = (first / "README.md").read_text()
    tell_no_paths(first, tmp_path, "somebody")
    carried_out(card, first, mixed, plan=plan)


def test_a_cut_of_experts_of_a_cut_carries_no_list_of_layers(mixed, tmp_path):
    sh.prune(mixed, [2], tmp_path / "once")
    left = sh.load_model(tmp_path / "once")[0].config.num_hidden_layers
    experts = dict.fromkeys(range(left), (0, 1))
    sh.prune(tmp_path / "once", [], tmp_path / "twice", experts=experts)
    there = {path.name for path in (tmp_path / "twice").iterdir()}
    assert there & {*EXPORT_FILES} == {"README.md"}
    _, layers, last = history((tmp_path / "twice" / "README.md").read_text())
    assert layers.startswith("cut: without layers [2, 3), ")
    assert "experts" in last


PLAN = sh.Plan(6, (), experts=DroppedExperts(6, {layer: (0, layer) for layer in (1, 2, 4)}))


def test_a_card_says_what_went():
    texts = texts_of(PLAN, dtype="bfloat16")
    assert tuple(texts) == export_files(PLAN) == ("README.md",)
    card = texts["README.md"]
    assert "# a/tiny without 2 of 6 experts a layer\n" in card
    assert "Routed experts were cut out of `a/tiny`; `shallower_plan.json` names each" in card
    assert "| experts removed | 2 of 6 experts of each of the layers [1, 3) [4, 5) |" in card
    assert "| kept | [0, 6), 6 of 6 layers |" in card
    assert front(card)["tags"] == ["shallower", "expert-pruning"]
    assert not any(word in card for word in ("mergekit-yaml", "--prune-layers"))
    assert "--plan shallower_plan.json" in blocks_of_code(card, "sh")[0]


@pytest.mark.parametrize("plan", [PLAN, sh.Plan(6, (sh.Block(1, 3),))], ids=["experts", "layers"])
def test_a_card_beside_a_gguf_file_names_the_files_that_lie_there(plan):
    for options, before in (({}, "cut."), ({"as_gguf": True}, "")):
        card = texts_of(plan, gguf="cut.gguf", options=options)["README.md"]
        named = re.findall(r"[\w.]*(?:shallower_plan\.json|mergekit\.yaml)", card)
        expected = {"shallower_plan.json" if plan.experts else "mergekit.yaml"}
        assert {*named} == {f"{before}{name}" for name in expected}
