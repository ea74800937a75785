"""What sentence-transformers reads beside the decoder of an embedder stays with every cut."""

import json

import pytest

import shallower as sh
from shallower.cutting import checkpoint_files, source
from shallower.cutting.source import find_source
from tests.cutting import embedders
from tests.folders import tree

DROPPED = [range(2, 4)]


@pytest.fixture
def embedder(tmp_path, words):
    return embedders.write(tmp_path / "embedder", words)


def rewrite(folder, change):
    """Change the modules of an embedder in place."""
    modules = json.loads((folder / "modules.json").read_text())
    change(modules)
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=["on-disk", "in-memory"])
def test_a_cut_has_the_modules_of_its_source(embedder, tmp_path, options):
    (embedder / "2_Dense").mkdir()
    for name in ("model.safetensors", "pytorch_model.bin", "config.json"):
        (embedder / "2_Dense" / name).write_text(name)
    (embedder / "3_Other").mkdir()
    (embedder / "3_Other" / "config.json").write_text("of nothing that modules.json names")
    rewrite(embedder, lambda modules: modules[2].update(path="2_Dense"))
    sh.prune(embedder, DROPPED, tmp_path / "cut", **options)
    there, whole = tree(tmp_path / "cut"), tree(embedder)
    dense = {f"2_Dense/{name}" for name in ("model.safetensors", "pytorch_model.bin")}
    assert there.keys() >= {*embedders.MODULES, *dense, "2_Dense/config.json"}
    assert all(there[name] == whole[name] for name in (*embedders.MODULES, *dense))
    assert not any(name.startswith("3_Other") for name in there)
    card = there["README.md"].decode()
    assert "library_name: sentence-transformers\npipeline_tag: sentence-similarity" in card
    assert 'encoder = SentenceTransformer(".")' in card
    assert not any(word in card for word in ("AutoModel", "vllm", "llama-cli"))


@pytest.mark.parametrize(
    "modules",
    [
        "not JSON",
        "{}",
        "[1]",
        '[{"path": []}]',
        '[{"path": ""}, {"path": ".."}, {"path": "../secret"}, {"path": "/etc"}]',
        '[{"path": "0_Transformer"}, {"path": "1_Pooling"}]',
    ],
)
def test_modules_that_are_none_within_the_folder_are_left_out(embedder, tmp_path, modules):
    """So that sentence-transformers refuses the cut, or loads no weights that are not cut."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("secret")
    (embedder / "0_Transformer").mkdir()
    (embedder / "0_Transformer" / "config.json").write_text("{}")
    (embedder / "modules.json").write_text(modules)
    sh.prune(embedder, DROPPED, tmp_path / "cut")
    assert not [path for path in (tmp_path / "cut").iterdir() if path.is_dir()]
    assert not [name for name in find_source(embedder).modules if "/" in name]


def test_a_link_out_of_the_folder_and_a_file_too_large_are_left_out(
    embedder, tmp_path, monkeypatch
):
    (tmp_path / "secret.json").write_text("secret")
    (embedder / "1_Pooling" / "link.json").symlink_to(tmp_path / "secret.json")
    (embedder / "1_Pooling" / "large.json").write_bytes(bytes(20_000))
    for module in (checkpoint_files, source):
        monkeypatch.setattr(module, "MAX_CARRIED_BYTES", 10_000)
    with pytest.warns(UserWarning, match="is left out"):
        sh.prune(embedder, DROPPED, tmp_path / "cut")
    sh.prune(embedder, DROPPED, tmp_path / "memory", dtype="bfloat16")
    for name in ("cut", "memory"):
        assert [file.name for file in (tmp_path / name / "1_Pooling").iterdir()] == ["config.json"]
