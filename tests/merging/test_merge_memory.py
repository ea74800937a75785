"""The memory of a merge does not depend on the size of the model."""

from dataclasses import replace

import pytest

from shallower.merging import merging
from shallower.models.identity import stored_digest
from shallower.results.healing import Healing
from tests.merging.merges import adapters_of, sparse_neox
from tests.peaks import needs_linux, peak_of

pytestmark = needs_linux


@pytest.fixture
def mebibytes(healed, tmp_path, monkeypatch):
    """The MiB that a merge takes, once one of a tiny model has left what libraries keep."""
    monkeypatch.setattr(merging, "place_for", lambda _num_bytes: None)

    def measured(**model):
        merging_of(tmp_path / "tiny", healed[1], hidden=64, inner=256)()
        merge = merging_of(tmp_path / "large", healed[1], **model)
        done = []
        peak = peak_of(lambda: done.append(merge()))
        assert done[0].check == "tensors"
        assert 0 < done[0].difference < done[0].tolerance
        return peak / 2**20

    return measured


def merging_of(place, record, *, hidden, inner, **more):
    """The merge of random adapters into a model of zeros."""
    base, adapters, out = place / "base", place / "adapters", place / "out"
    names = sparse_neox(base, hidden, inner, **more)
    shapes = {"dense_h_to_4h": (inner, hidden), "dense_4h_to_h": (hidden, inner)}
    adapters_of(adapters, names, shapes, rank=2)
    record = replace(record, weights=stored_digest(base), merge=None)
    (adapters / "healing.json").write_bytes(record.to_bytes())
    out.mkdir()
    job = merging.Merging(str(base), adapters, Healing.load(adapters), progress=False)
    return lambda: job.into(out)


@pytest.mark.slow
def test_a_large_tensor_is_merged_in_small_memory(mebibytes):
    """Two weights of 64 MiB, of which the whole in float32 would be 128 each."""
    assert mebibytes(hidden=1024, inner=1 << 15) < 120


def test_many_shards_are_merged_in_small_memory(mebibytes, tmp_path):
    """120 MiB in all."""
    assert mebibytes(hidden=512, inner=1 << 11, layers=20, shards=20) < 75
    assert len(list((tmp_path / "large" / "out").glob("*.safetensors"))) == 20


@pytest.mark.slow
def test_a_tensor_of_four_gibibytes_is_merged_in_less_than_one(mebibytes, tmp_path):
    """Two of them, which the adapters change, and the attention's beside them."""
    assert mebibytes(hidden=4096, inner=1 << 19) < 1000
    assert (tmp_path / "large" / "out" / "model.safetensors").stat().st_size > 8 << 30
