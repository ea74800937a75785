"""A scan into a folder that was killed behind its states, and before its own file."""

import pytest

import shallower as sh
from shallower.models.source import ModelSource
from shallower.runs.scan import ScanJob
from tests.cli.documents import tree
from tests.documents import documents


@pytest.fixture
def scan(llama, words, tmp_path):
    """Scan so many texts into a folder, with their states."""
    sh.save_model(llama, words, tmp_path / "model")
    source = ModelSource(tmp_path / "model", "float32")

    def run(count):
        out = tmp_path / "out"
        job = ScanJob(
            source=source, texts=documents(count), out=out, keep_states=out / "states.safetensors"
        )
        return job.run(*source.load())

    return run


def test_it_goes_on_to_the_same_files(scan, tmp_path):
    scan(12)
    out = tmp_path / "out"
    whole = tree(out)
    (out / "scan.safetensors").rename(out / "scan.partial.safetensors")
    (out / "heat_map.png").unlink()
    scan(12)
    assert tree(out).keys() == whole.keys()
    assert all(tree(out)[name] == whole[name] for name in whole if name != "heat_map.png")


def test_states_of_fewer_texts_are_refused(scan, tmp_path):
    scan(12)
    out = tmp_path / "out"
    (out / "scan.safetensors").rename(out / "scan.partial.safetensors")
    before = (out / "states.safetensors").read_bytes()
    with pytest.raises(sh.OutputError, match="exists already, and has the states of fewer texts"):
        scan(15)
    assert (out / "states.safetensors").read_bytes() == before


def test_states_without_the_work_of_a_scan_are_refused(scan, tmp_path):
    scan(12)
    out = tmp_path / "out"
    (out / "scan.safetensors").unlink()
    with pytest.raises(sh.OutputError, match="exists already"):
        scan(12)
