"""Every command of every kind of card, carried out in another place than the cut was made."""

import pytest

import shallower as sh
from tests.conftest import mostly_slow, tiny_llama
from tests.cutting.card_tools import (
    assert_same_weights,
    blocks_of_code,
    check_other_tools,
    hub,
    stand_for,
    tell_no_paths,
    ways,
)
from tests.folders import tree, without_result_record
from tests.models.gguf_files import write_gguf

__all__ = ["hub"]

DROPPED = [1, 3, 4]


@pytest.fixture
def source(tmp_path, words):
    """A folder of a random Llama of 6 layers, named by a long path."""
    folder = tmp_path / "of" / "somebody" / "tiny"
    tiny_llama(initializer_range=0.2).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def in_memory(source, out):
    model, tokenizer = sh.load_model(source, dtype="bfloat16")
    sh.save_model(model, tokenizer, out, plan=sh.drop_layers(model, DROPPED))


def in_four_bits(source, out):
    model, tokenizer = sh.load_model(source, dtype="nf4")
    sh.save_model(model, tokenizer, out, plan=sh.drop_layers(model, DROPPED))


def on_disk(source, out):
    sh.prune(source, DROPPED, out)


def by_the_door(source, out):
    sh.prune(source, DROPPED, out, dtype="float16")


def in_shards(source, out):
    sh.prune(source, DROPPED, out, max_shard_size="30KB")


def from_within(source, out):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(source)
        sh.prune(".", DROPPED, out)


FOLDERS = [in_memory, in_four_bits, on_disk, by_the_door, in_shards, from_within]


@pytest.mark.parametrize("cut", mostly_slow(FOLDERS, [in_memory, on_disk, from_within]))
def test_a_card_of_a_folder(source, tmp_path, monkeypatch, shallower, cut):
    first = tmp_path / "first"
    cut(source, first)
    card = (first / "README.md").read_text()
    assert "# tiny without layers [1, 2) [3, 5)\n" in card
    assert "`SOURCE` stands for the\nfolder of `tiny`." in card
    tell_no_paths(first, tmp_path, "somebody")
    for name, make in ways(card, shallower).items():
        monkeypatch.chdir(stand_for(tmp_path / name, source))
        make()
        assert_same_weights("cut", first)
        assert (tmp_path / name / "cut" / "README.md").read_text() == card
    check_other_tools(card, first, [0, 2, 5])
    assert_loads(card, first, monkeypatch, 3)


def assert_loads(card, folder, monkeypatch, num_layers):
    monkeypatch.chdir(folder)
    loaded = {}
    exec(blocks_of_code(card, "python")[1], loaded)
    assert loaded["model"].config.num_hidden_layers == num_layers
    assert loaded["tokenizer"]("w1 w2")["input_ids"]


def test_a_card_of_a_model_of_the_hub(source, tmp_path, monkeypatch, shallower, hub):
    hub(source, "a/tiny")
    for name, cut in (("door", by_the_door), ("memory", in_memory)):
        cut("a/tiny", tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert "# a/tiny without layers" in card
        assert "SOURCE" not in card
        tell_no_paths(tmp_path / name, tmp_path, "somebody")
        for way, make in ways(card, shallower).items():
            place = tmp_path / f"{name}-{way}"
            place.mkdir()
            monkeypatch.chdir(place)
            make()
            assert_same_weights("cut", tmp_path / name)
            assert (place / "cut" / "README.md").read_text() == card
        check_other_tools(card, tmp_path / name, [0, 2, 5])


@pytest.fixture
def files(tmp_path):
    """A folder with a GGUF file of 4 layers and nothing else."""
    folder = tmp_path / "of" / "somebody" / "files"
    folder.mkdir(parents=True)
    write_gguf(folder / "tiny.gguf")
    return folder


@pytest.mark.parametrize("as_gguf", [False, True])
def test_a_card_of_a_gguf_file(files, tmp_path, monkeypatch, shallower, as_gguf):
    first = tmp_path / "first"
    out = first / ("cut" if as_gguf else "cut.gguf")
    sh.prune(files / "tiny.gguf", [1, 2], out, as_gguf=as_gguf)
    folder = out if as_gguf else first
    card = (folder / ("README.md" if as_gguf else "cut.README.md")).read_text()
    assert "# tiny.gguf without layers [1, 3)\n" in card
    assert "`SOURCE` stands for the\nfolder that holds `tiny.gguf`." in card
    tell_no_paths(first, tmp_path, "somebody")
    for name, make in ways(card, shallower).items():
        monkeypatch.chdir(stand_for(tmp_path / name, files))
        make()
        (tmp_path / name / "SOURCE").unlink()
        assert without_result_record(tree(tmp_path / name)) == tree(first)
    check_other_tools(card, folder, [0, 3])
    assert_loads(card, folder, monkeypatch, 2)


@pytest.mark.parametrize("in_folder", mostly_slow([False, True], [False]))
def test_a_card_of_a_gguf_file_that_was_loaded(files, tmp_path, monkeypatch, shallower, in_folder):
    first = tmp_path / "first"
    if in_folder:
        sh.prune(files, [1, 2], first, gguf_file="tiny.gguf", dtype="float32")
    else:
        model, tokenizer = sh.load_model(files / "tiny.gguf", dtype="float32")
        sh.save_model(model, tokenizer, first, plan=sh.drop_layers(model, [1, 2]))
    card = (first / "README.md").read_text()
    assert "--gguf-file tiny.gguf" in card
    assert "mergekit reads no GGUF file" in (first / "mergekit.yaml").read_text()
    tell_no_paths(first, tmp_path, "somebody")
    for name, make in ways(card, shallower).items():
        monkeypatch.chdir(stand_for(tmp_path / name, files))
        make()
        assert_same_weights("cut", first)
        assert (tmp_path / name / "cut" / "README.md").read_text() == card
    check_other_tools(card, first, [0, 3])
    assert_loads(card, first, monkeypatch, 2)


def test_a_card_of_a_gguf_file_of_the_hub(files, tmp_path, monkeypatch, shallower, hub):
    hub(files, "a/tiny-GGUF")
    first = tmp_path / "first"
    sh.prune("a/tiny-GGUF", [1, 2], first / "cut.gguf", gguf_file="tiny.gguf")
    card = (first / "cut.README.md").read_text()
    assert "cut out of `tiny.gguf` of `a/tiny-GGUF`." in card
    for name, make in ways(card, shallower).items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        make()
        assert without_result_record(tree(tmp_path / name)) == tree(first)
    with pytest.raises(sh.ModelError, match=r"cannot fetch none\.gguf of a/tiny-GGUF"):
        sh.prune("a/tiny-GGUF", [1], tmp_path / "x.gguf", gguf_file="none.gguf")
