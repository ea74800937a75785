"""Statistics of experts in a scan: kept in its file, merged, resumed, streamed, in shards."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import shallower as sh
from shallower.memory import budget
from shallower.scanning.scan_file import FORMAT, scan_bytes
from shallower.scanning.shards import Shards, joined
from shallower.settings.stages import ScanSettings
from shallower.values.shard import Shard
from tests.conftest import mostly_slow
from tests.cutting.mixtures import mixture
from tests.documents import documents
from tests.scanning.samples import changed_file, load

TEXTS = documents(40)
OPTIONS = {"max_length": 12, "batch_size": 2, "experts": True}
UNUSED = pytest.warns(UserWarning, match=r"\d+ of 48 experts received no token from these texts")


@pytest.fixture(scope="module")
def mixtral():
    return mixture("mixtral")


@pytest.fixture(scope="module")
def whole(mixtral, words, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole") / "scan.safetensors"
    sh.scan(mixtral, words, TEXTS, **OPTIONS).save(place)
    return place


def test_a_scan_has_statistics_of_all_tokens_and_comes_back(whole):
    found = sh.Scan.load(whole)
    tokens = sum(min(12, len(text.split())) for text in TEXTS)
    assert (found.experts.counts.sum(1) == 2 * tokens).all()
    assert found.experts.num_texts == len(TEXTS)
    assert found.num_samples == len(TEXTS)
    assert scan_bytes(found.contents) == whole.read_bytes()


def test_a_scan_without_experts_is_as_ever(mixtral, words, whole, tmp_path):
    """Its file has nothing of them, and its sums are those of the scan with experts."""
    plain = sh.scan(mixtral, words, TEXTS, **{**OPTIONS, "experts": False})
    plain.save(tmp_path / "plain")
    with safe_open(tmp_path / "plain", framework="numpy") as file:
        assert list(file.keys()) == ["sums"]
        assert "experts" not in json.loads(file.metadata()[FORMAT])
    assert plain.contents.sums.to_bytes() == sh.Scan.load(whole).contents.sums.to_bytes()
    with pytest.raises(sh.ScanError, match=r"no statistics of experts: scan .* \(--experts\)"):
        plain.plan(experts=2)
    assert sh.Scan.merge([plain, sh.Scan.load(whole)]).contents.experts is None


def test_scans_are_merged_to_the_bits_of_the_whole(mixtral, words, whole):
    parts = [sh.scan(mixtral, words, TEXTS[place], **OPTIONS) for place in _PARTS]
    one, other = sh.Scan.merge(parts), sh.Scan.merge(parts[::-1])
    assert _bytes(one) == _bytes(other)
    assert one.experts.header() == other.experts.header()
    assert one.experts.num_texts == len(TEXTS)
    total = sh.Scan.load(whole).experts
    assert np.array_equal(one.experts.counts, total.counts)  # batches differ, and so last bits
    np.testing.assert_allclose(one.experts.total("gated"), total.total("gated"), rtol=1e-5)
    assert parts[0].experts.num_texts == 16, "a merge has changed its part"


_PARTS = (slice(16), slice(16, 30), slice(30, 40))


def _bytes(scan):
    return scan.experts.sums.to_bytes(), scan.experts.pairs.to_bytes()


def test_shards_make_the_bytes_of_the_whole(mixtral, words, whole):
    shards = Shards(mixtral, words, TEXTS, ScanSettings(**OPTIONS))
    parts = [shards.scan(Shard(index, 3), progress=False) for index in range(3)]
    assert scan_bytes(joined(parts).contents) == whole.read_bytes()
    plain = Shards(mixtral, words, TEXTS, ScanSettings(**{**OPTIONS, "experts": False}))
    assert plain.common["settings"] != shards.common["settings"]
    with pytest.raises(sh.ScanError, match="it has no statistics of experts"):
        joined([*parts[:2], plain.scan(Shard(2, 3), progress=False)])


def test_an_interrupted_scan_goes_on_to_the_same_bytes(
    mixtral, words, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr("shallower.scanning.model.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    part = tmp_path / "part.safetensors"

    def broken():
        yield from TEXTS[:36]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sh.scan(mixtral, words, broken(), checkpoint=part, **OPTIONS)
    assert 0 < sh.Scan.load(part).experts.num_texts < 40
    with pytest.raises(sh.ScanError, match="it has statistics of experts"):
        sh.scan(mixtral, words, TEXTS, checkpoint=part, **{**OPTIONS, "experts": False})
    again = sh.scan(mixtral, words, TEXTS, checkpoint=part, **OPTIONS)
    assert scan_bytes(again.contents) == whole.read_bytes()


@pytest.mark.parametrize(
    "name",
    mostly_slow(["mixtral", "llama4_text", "granitemoehybrid"], ["mixtral"]),
)
def test_layers_that_wait_on_disk_give_the_same_bytes(name, words, tmp_path, monkeypatch):
    """In several passes, with ratios of weights and what a layer does to the stream."""
    mixture(name).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(budget.BUDGET, "bound", 30_000)
    found = []
    for place in ("stream", None):
        model, tokenizer = sh.load_model(tmp_path / "model", "float32", place, progress=False)
        done = sh.scan(model, tokenizer, TEXTS[:16], **OPTIONS)
        found.append(scan_bytes(done.contents))
        assert done.experts.has_stream == (name != "granitemoehybrid")
        assert not np.isnan(done.experts.aimer).any()
    assert found[0] == found[1]


def test_a_text_without_tokens_is_no_text_of_the_statistics(mixtral, words):
    with UNUSED, pytest.warns(sh.RejectedSamplesWarning):
        found = sh.scan(mixtral, words, ["w1 w2", "", "w3"], **OPTIONS)
    assert found.experts.num_texts == 2


def test_unused_experts_are_counted_once_all_shards_are_there(mixtral, words):
    """A shard alone says nothing of them: its error would be one here."""
    settings = ScanSettings(max_length=12, batch_size=1, experts=True)
    shards = Shards(mixtral, words, ["w1 w2", "w3"], settings)
    parts = [shards.scan(Shard(index, 2), progress=False) for index in range(2)]
    with UNUSED:
        joined(parts)


def test_bfloat16_is_observed(words, whole):
    model = mixture("mixtral").to(torch.bfloat16)
    found = sh.scan(model, words, TEXTS, **OPTIONS).experts
    assert found.has_stream
    plain = sh.Scan.load(whole).experts
    routed = plain.counts > 50
    np.testing.assert_allclose(found.mean("norm")[routed], plain.mean("norm")[routed], rtol=0.05)


def _header(change):
    def damage(header, arrays):
        change(header["experts"])

    return damage


DAMAGES = {
    "layers": _header(lambda of: of.update(layers=[1, 0, 2, 3, 4, 5, 6, 7])),
    "too many layers": _header(lambda of: of.update(layers=[*range(1, 8), 99])),
    "other experts": _header(lambda of: of["routing"].update(num_experts=7)),
    "no number": _header(lambda of: of.update(left_out="1")),
    "negative": _header(lambda of: of.update(left_out=-1)),
    "no truth": _header(lambda of: of.update(has_stream=1)),
    "no entry": lambda header, arrays: header.pop("experts"),
    "no ratios": lambda header, arrays: arrays.pop("experts.aimer"),
    "no pairs": lambda header, arrays: arrays.pop("experts.pairs"),
    "pairs": lambda header, arrays: arrays.update({"experts.pairs": arrays["experts"]}),
    "ratios": lambda header, arrays: arrays["experts.aimer"].fill(2),
    "sums": lambda header, arrays: arrays["experts"].put(3, 7),
    "size": lambda header, arrays: arrays["experts"].put(range(8, 24), 255),
    "routing": _header(lambda of: of["routing"].update(num_groups=0)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused(name, whole):
    with pytest.raises(sh.ScanError, match="is damaged, or not a scan"):
        load(changed_file(whole.read_bytes(), DAMAGES[name]))
