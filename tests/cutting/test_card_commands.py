"""Every command of every kind of card, carried out in another place than the cut was made."""

from functools import partial

import pytest

import shallower as sh
from tests.conftest import mostly_slow, tiny_llama
from tests.cutting.card_tools import (
    blocks_of_code,
    check_other_tools,
    hub,
    in_memory,
    on_disk,
    tell_no_paths,
)
from tests.models.gguf_files import write_gguf

__all__ = ["hub"]


@pytest.fixture
def source(tmp_path, words):
    """A folder of a random Llama of 6 layers, named by a long path."""
    folder = tmp_path / "of" / "somebody" / "tiny"
    tiny_llama(initializer_range=0.2).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def from_within(source, out):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(source)
        on_disk(".", out)


FOLDERS = {
    "in memory": in_memory,
    "in four bits": partial(in_memory, dtype="nf4"),
    "on disk": on_disk,
    "in another dtype": partial(on_disk, dtype="float16"),
    "in shards": partial(on_disk, max_shard_size="30KB"),
    "from within": from_within,
}


@pytest.mark.parametrize("way", mostly_slow(FOLDERS, ["in memory", "on disk", "from within"]))
def test_a_card_of_a_folder(source, tmp_path, monkeypatch, carried_out, way):
    first = tmp_path / "first"
    FOLDERS[way](source, first)
    card = (first / "README.md").read_text()
    assert "# tiny without layers [1, 2) [3, 5)\n" in card
    assert "`SOURCE` stands for the\nfolder of `tiny`." in card
    tell_no_paths(first, tmp_path, "somebody")
    carried_out(card, first, source)
    check_other_tools(card, first, [0, 2, 5])
    assert_loads(card, first, monkeypatch, 3)


def assert_loads(card, folder, monkeypatch, num_layers):
    monkeypatch.chdir(folder)
    loaded = {}
    exec(blocks_of_code(card, "python")[1], loaded)
    assert loaded["model"].config.num_hidden_layers == num_layers
    assert loaded["tokenizer"]("w1 w2")["input_ids"]


def test_a_card_of_a_model_of_the_hub(source, tmp_path, carried_out, hub):
    hub(source, "a/tiny")
    for name in ("in another dtype", "in memory"):
        FOLDERS[name]("a/tiny", tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert "# a/tiny without layers" in card
        assert "SOURCE" not in card
        tell_no_paths(tmp_path / name, tmp_path, "somebody")
        carried_out(card, tmp_path / name)
        check_other_tools(card, tmp_path / name, [0, 2, 5])


@pytest.fixture
def files(tmp_path):
    """A folder with a GGUF file of 4 layers and nothing else."""
    folder = tmp_path / "of" / "somebody" / "files"
    folder.mkdir(parents=True)
    write_gguf(folder / "tiny.gguf")
    return folder


@pytest.mark.parametrize("as_gguf", [False, True])
def test_a_card_of_a_gguf_file(files, tmp_path, monkeypatch, carried_out, as_gguf):
    first = tmp_path / "first"
    out = first / ("cut" if as_gguf else "cut.gguf")
    sh.prune(files / "tiny.gguf", [1, 2], out, as_gguf=as_gguf)
    folder = out if as_gguf else first
    card = (folder / ("README.md" if as_gguf else "cut.README.md")).read_text()
    assert "# tiny.gguf without layers [1, 3)\n" in card
    assert "`SOURCE` stands for the\nfolder that holds `tiny.gguf`." in card
    tell_no_paths(first, tmp_path, "somebody")
    carried_out(card, first, files, whole=True)
    check_other_tools(card, folder, [0, 3])
    assert_loads(card, folder, monkeypatch, 2)


@pytest.mark.parametrize("in_folder", mostly_slow([False, True], [False]))
def test_a_card_of_a_gguf_file_that_was_loaded(
    files, tmp_path, monkeypatch, carried_out, in_folder
):
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
    carried_out(card, first, files)
    check_other_tools(card, first, [0, 3])
    assert_loads(card, first, monkeypatch, 2)


def test_a_card_of_a_gguf_file_of_the_hub(files, tmp_path, carried_out, hub):
    hub(files, "a/tiny-GGUF")
    first = tmp_path / "first"
    sh.prune("a/tiny-GGUF", [1, 2], first / "cut.gguf", gguf_file="tiny.gguf")
    card = (first / "cut.README.md").read_text()
    assert "cut out of `tiny.gguf` of `a/tiny-GGUF`." in card
    carried_out(card, first, whole=True)
    with pytest.raises(sh.ModelError, match=r"cannot fetch none\.gguf of a/tiny-GGUF"):
        sh.prune("a/tiny-GGUF", [1], tmp_path / "x.gguf", gguf_file="none.gguf")
