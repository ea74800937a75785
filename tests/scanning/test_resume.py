"""An interrupted scan goes on to the same bytes."""

import copy

import pytest

import shallower as sh
from shallower import Scan, ScanError, TextsError
from tests.conftest import edited, mostly_slow, tiny_llama
from tests.documents import HELD_OUT, TEXTS, broken_after, documents


# An interrupted scan.
def interrupted(model, tokenizer, path, texts, count, monkeypatch, **options):
    """Scan until the texts break, saving after every window."""
    with monkeypatch.context() as patch:
        patch.setattr("shallower.scanning.model.SECONDS_BETWEEN_CHECKPOINTS", -1)
        with pytest.raises(OSError, match="the disk went away"):
            sh.scan(model, tokenizer, broken_after(texts, count), checkpoint=path, **options)


@pytest.mark.parametrize("count", mostly_slow([16, 20, 40], [40]))
def test_a_resumed_scan_has_the_same_bytes(llama, words, tmp_path, monkeypatch, count):
    texts = documents(56)
    sh.scan(llama, words, texts, batch_size=1).save(tmp_path / "whole")
    interrupted(llama, words, tmp_path / "partial", texts, count, monkeypatch, batch_size=1)
    assert Scan.load(tmp_path / "partial").num_samples == count // 16 * 16
    resumed = sh.scan(llama, words, texts, batch_size=1, checkpoint=tmp_path / "partial")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
def test_a_resumed_scan_has_the_same_rejections(llama, words, tmp_path, monkeypatch):
    texts = documents(48)
    texts[3] = texts[20] = texts[40] = ""
    whole = sh.scan(llama, words, texts, batch_size=1)
    interrupted(llama, words, tmp_path / "partial", texts, 33, monkeypatch, batch_size=1)
    resumed = sh.scan(llama, words, texts, batch_size=1, checkpoint=tmp_path / "partial")
    assert [rejection.sample for rejection in whole.rejections] == [3, 20, 40]
    assert resumed.rejections == whole.rejections
    assert resumed.num_rejected == whole.num_rejected == 3
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_finished_scan_resumes_to_itself(llama, words, tmp_path):
    whole = sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")
    again = sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")
    assert again.num_samples == whole.num_samples == len(TEXTS)
    assert (again.mean() == whole.mean()).all()


def test_a_scan_does_not_go_on_from_another_one(llama, words, tmp_path):
    sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")
    before = (tmp_path / "partial").read_bytes()
    others = [
        (llama, words, HELD_OUT, {}),
        (llama, words, TEXTS[:-1], {}),
        (llama, words, ["w1", *TEXTS[1:]], {}),
        (llama, words, TEXTS, {"max_length": 5}),
        (llama, words, TEXTS, {"metrics": ("cosine",)}),
        (tiny_llama(num_layers=5), words, TEXTS, {}),
        (edited(llama), words, TEXTS, {}),
        (copy.deepcopy(llama).bfloat16(), words, TEXTS, {}),
    ]
    for model, tokenizer, texts, options in others:
        with pytest.raises(ScanError, match=r"partial.*delete it to start anew"):
            sh.scan(model, tokenizer, texts, checkpoint=tmp_path / "partial", **options)
        assert (tmp_path / "partial").read_bytes() == before


def test_a_damaged_checkpoint_is_refused(llama, words, tmp_path):
    sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")
    (tmp_path / "partial").write_bytes((tmp_path / "partial").read_bytes()[:500])
    with pytest.raises(ScanError, match=r"partial is truncated.*delete it to start anew"):
        sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_scan_that_finds_nothing_leaves_no_checkpoint(llama, words, tmp_path, texts):
    with pytest.raises((TextsError, sh.StatesError)):
        sh.scan(llama, words, texts, checkpoint=tmp_path / "partial")
    assert list(tmp_path.iterdir()) == []
