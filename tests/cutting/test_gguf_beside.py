"""The files beside a cut GGUF file, or in a folder with it; what is refused, memory and the GIL."""

import os

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, size_label

import shallower as sh
from shallower._core import Gguf
from shallower.cutting.exports import export_path
from shallower.cutting.gguf import plan_path
from tests.cutting.card_tools import LICENSED, front
from tests.cutting.gguf_files import CUT, files_of_cut, write
from tests.folders import full_disk, tree, tree_of_ours
from tests.models.gguf_files import written
from tests.peaks import needs_linux, peak_of
from tests.scanning.ticks import ticks_beside

DROPPED = [1, 3, 4]


def test_a_cut_gguf_has_its_files_beside_it(tmp_path, shallower):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "out" / "cut.gguf"
    (tmp_path / "README.md").write_text("# Of something else\n")
    words = (source, "--drop", "1,3:5", "--out", out)
    there = shallower("prune", *words, "--dry-run", "--json").json["write"]
    assert there == [str(path) for path in files_of_cut(out)]
    assert not out.parent.exists()
    sh.prune(source, DROPPED, out)
    assert set(out.parent.iterdir()) == set(files_of_cut(out))
    card = export_path(out, "README.md").read_text()
    assert front(card) == {
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["shallower", "layer-pruning"],
    }
    assert "Of something else" not in card
    assert export_path(out, "prune_layers.txt").read_text() == "1,3,4\n"

    for name, text in (("README.md", LICENSED), ("tiny.README.md", "---\nlicense: mit\n---\n")):
        (tmp_path / name).write_text(text)
        sh.prune(source, DROPPED, out, overwrite=True)
        expected = "mit" if name.startswith("tiny") else "other"
        assert front(export_path(out, "README.md").read_text())["license"] == expected


@pytest.mark.parametrize("index", range(5))
def test_a_file_beside_a_gguf_is_not_replaced_unasked(tmp_path, shallower, index):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "cut.gguf"
    taken = files_of_cut(out)[index]
    taken.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(sh.OutputError, match=f"{taken.name} exists already"):
        sh.prune(source, DROPPED, out)
    refused = shallower("prune", source, "--drop", "1", "--out", out, "--dry-run")
    assert f"{taken.name} exists already" in refused.error
    assert tree(tmp_path) == before
    if index > 1:  # the plan says that all are of an earlier cut
        with pytest.raises(sh.OutputError, match=f"cut.gguf: no .* wrote {taken.name} there"):
            sh.prune(source, DROPPED, out, overwrite=True)
        refused = shallower("prune", source, "--drop", "1", "--out", out, "--overwrite")
        assert f"wrote {taken.name} there; choose another place" in refused.error
        assert tree(tmp_path) == before
        plan_path(out).write_text("of an earlier cut")
    sh.prune(source, DROPPED, out, overwrite=True)
    assert taken.read_bytes() != b"mine"
    taken.unlink()
    taken.mkdir()
    before = tree(tmp_path)
    with pytest.raises(sh.OutputError, match="is a folder"):
        sh.prune(source, DROPPED, out, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_gguf_that_fails_midway_leaves_all_as_it_was(tmp_path, overwrite):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "cut.gguf"
    if overwrite:
        sh.prune(source, [0], out)
    before = tree(tmp_path)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sh.prune(source, DROPPED, out, overwrite=overwrite, progress=stop)
    assert tree(tmp_path) == before
    broken = sh.Plan(6, (sh.Block(1, 2),), versions={"made by": object()})
    with pytest.raises(TypeError):
        sh.prune(source, broken, out, overwrite=overwrite)
    assert tree(tmp_path) == before


# The logits of a cut GGUF file.
def test_a_gguf_that_transformers_cannot_load_is_refused_before_the_cut(tmp_path, shallower):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "cut.gguf"
    done = shallower("prune", source, "--drop", "1", "--out", out, "--verify")
    assert "cannot load" in done.error
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


# A folder as the hub shows it.
FILES = ["README.md", "mergekit.yaml", "prune_layers.txt", "shallower_plan.json", "small.gguf"]


def test_a_folder_for_the_hub_holds_the_file_and_its_card(tmp_path, shallower):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "small"
    words = ("prune", source, "--drop", "1,3:5", "--out", out, "--as-gguf")
    there = shallower(*words, "--dry-run", "--json").json["write"]
    assert sorted(there) == [str(out / name) for name in FILES]
    assert not out.exists()
    assert shallower(*words, "--json").json["written"] == str(out)
    assert sorted(tree_of_ours(out)) == FILES
    sh.prune(source, DROPPED, tmp_path / "beside.gguf")
    assert (out / "small.gguf").read_bytes() == (tmp_path / "beside.gguf").read_bytes()
    assert sh.Plan.load(out / "shallower_plan.json").dropped == tuple(DROPPED)
    card = (out / "README.md").read_text()
    assert front(card)["library_name"] == "gguf"
    assert "mergekit-yaml mergekit.yaml merged" in card
    before = tree(out)
    other = [word if word != "1,3:5" else "1" for word in words]
    assert "exists already" in shallower(*other).error
    assert "exists already" in shallower(*other, "--dry-run").error
    for options in ((), ("--overwrite",), ("--overwrite", "--no-cache")):
        again = shallower(*words, *options)
        assert again.status == 0, again.err
        assert ("already there, made from the same" in again.err) == ("--no-cache" not in options)
        assert tree(out) == before


def test_a_folder_for_the_hub_is_whole_or_not_at_all(tmp_path):
    (tmp_path / "files").mkdir()
    source = write(tmp_path / "files" / "tiny.gguf")
    before = tree(tmp_path)
    broken = sh.Plan(6, (sh.Block(1, 2),), versions={"made by": object()})
    with pytest.raises(TypeError):
        sh.prune(source, broken, tmp_path / "cut", as_gguf=True)
    assert tree(tmp_path) == before
    with pytest.raises(sh.OutputError, match=r"it holds .*tiny.gguf, which is read"):
        sh.prune(source, DROPPED, tmp_path / "files", as_gguf=True, overwrite=True)
    with pytest.raises(sh.ModelError, match=r"not a \.gguf file"):
        sh.prune(tmp_path / "files", DROPPED, tmp_path / "cut", as_gguf=True)
    assert tree(tmp_path) == before


def test_experts_count_as_in_gguf(tmp_path):
    """``GGUFWriter.get_total_parameter_count`` and ``gguf.size_label`` are the rule."""

    def build(path, layers):
        writer = GGUFWriter(path, "llama")
        writer.add_block_count(len(layers))
        writer.add_size_label("8x7B")
        writer.add_tensor("token_embd.weight", np.zeros((70, 50), np.float32))
        for layer in range(len(layers)):
            experts = layers[layer]
            shapes = {"up_exps.weight": (experts, 30, 20), "up_exps.bias": (experts, 30)}
            for name, shape in {**shapes, "norm.weight": (9,)}.items():
                writer.add_tensor(f"blk.{layer}.{name}", np.zeros(shape, np.float32))
        label = size_label(*writer.get_total_parameter_count())
        written(writer, path)
        return label

    build(tmp_path / "a.gguf", [4, 8, 3, 16])
    for dropped, left in (([0], [8, 3, 16]), ([1, 3], [4, 3]), ([0, 1, 2], [16])):
        label = build(tmp_path / "expected.gguf", left)
        sh.prune(tmp_path / "a.gguf", dropped, tmp_path / "b.gguf", overwrite=True)
        fields = GGUFReader(tmp_path / "b.gguf").fields
        assert fields["general.size_label"].contents() == label


def test_split_files_are_refused(tmp_path):
    source = write(tmp_path / "a-00001-of-00003.gguf", split=3)
    with pytest.raises(sh.ModelError, match=r"one of 3 files.*llama-gguf-split --merge"):
        sh.prune(source, [1], tmp_path / "b.gguf")


def test_a_full_disk_leaves_nothing(real, tmp_path):
    with full_disk(1 << 24), pytest.raises(sh.OutputError, match="File too large"):
        sh.prune(real, CUT, tmp_path / "b.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_gil_is_free(real, tmp_path):
    assert ticks_beside(lambda: sh.prune(real, CUT, tmp_path / "b.gguf")) >= 3


@needs_linux
def test_memory_is_constant(real, tmp_path):
    assert peak_of(lambda: sh.prune(real, CUT, tmp_path / "b.gguf")) < 16 << 20


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, words in (("none.gguf", "No such file"), ("pipe.gguf", "not a regular file")):
        with pytest.raises(sh.ModelError, match=words):
            Gguf(tmp_path / name)
