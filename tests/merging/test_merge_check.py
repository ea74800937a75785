"""Merged checkpoints and their check, and merges that are refused or interrupted."""

import json
import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shallower as sh
from shallower.cutting import rewriting
from shallower.cutting.rewriting import StoredCheckpoint
from shallower.memory import placement
from shallower.memory.placement import place_for
from shallower.merging import merging
from shallower.merging.low_rank import LowRank
from shallower.models.identity import stored_digest
from shallower.results.healing import Healing
from tests.conftest import tiny_llama
from tests.cutting.card_tools import hub
from tests.families import small_config
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS, save_cut
from tests.merging.merges import merged_by_peft, steps_apart, tensors

__all__ = ["hub"]


@pytest.fixture
def too_large(monkeypatch):
    """Every model is too large for the memory that is free."""
    monkeypatch.setattr(merging, "place_for", lambda _num_bytes: None)


def test_a_model_that_fits_nowhere_is_compared_by_its_tensors(
    healed, cut, tmp_path, too_large, monkeypatch, shallower
):
    monkeypatch.setattr(merging.ModelSource, "load", lambda *_: pytest.fail("loaded"))
    done = shallower("merge", healed[0], "--out", tmp_path / "merged", "--json")
    assert done.status == 0, done.err
    merge = done.json["merge"]
    assert (merge["check"], merge["loss"]) == ("tensors", None)
    assert 0 < merge["difference"] < merge["tolerance"] == torch.finfo(torch.float32).eps
    assert Healing.load(tmp_path / "merged").merge.to_json() == merge
    told = shallower("merge", healed[0], "--out", tmp_path / "again")
    assert "merged into float32: weights differ from the exact sums by" in told.out
    expected = merged_by_peft(cut, healed[0], tmp_path / "peft", "float32")
    got = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(int(steps_apart(got[name], value).max()) <= 2 for name, value in expected.items())
    names = {file.name for file in cut.iterdir()} | {
        "healing.json", "healing.png", "shallower_record.json",
    }  # fmt: skip
    assert {file.name for file in (tmp_path / "merged").iterdir()} == names


@pytest.mark.parametrize("check", ["tensors", "logits"])
def test_a_merge_without_its_adapters_is_found(healed, tmp_path, check, monkeypatch):
    if check == "tensors":
        monkeypatch.setattr(merging, "place_for", lambda _num_bytes: None)

    def unchanged(change, read, device):
        for left, right in change.panels(device):
            yield read(4 * left.shape[0] * right.shape[1])

    monkeypatch.setattr(LowRank, "changed", unchanged)
    message = "was not merged as it should" if check == "tensors" else "its logits are off by"
    with pytest.raises(sh.ModelError, match=message):
        sh.merge(healed[0], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_the_loss_is_left_out_where_the_model_does_not_fit(healed, cut, tmp_path, too_large):
    (tmp_path / "merged").mkdir()
    job = merging.Merging(str(cut), healed[0], healed[1], HELD_OUT, progress=False)
    with pytest.warns(UserWarning, match=r"loss of the merged model is not measured: .* fit"):
        merge = job.into(tmp_path / "merged")
    assert merge.loss is None


def test_the_loss_is_measured_where_the_stored_weights_fit(healed, cut, tmp_path, monkeypatch):
    places = iter([None, "cpu"])
    monkeypatch.setattr(merging, "place_for", lambda _num_bytes: next(places))
    (tmp_path / "merged").mkdir()
    job = merging.Merging(str(cut), healed[0], healed[1], HELD_OUT, progress=False)
    merge = job.into(tmp_path / "merged")
    assert merge.check == "tensors"
    assert merge.loss.nats == pytest.approx(healed[1].after.nats, abs=1e-5)


@pytest.mark.parametrize(
    ("cards", "size", "place"),
    [(2, 60, "auto"), (2, 20, "auto"), (2, 80, None), (0, 20, "cpu"), (0, 30, None)],
)
def test_a_place_is_found_where_there_is_room(monkeypatch, cards, size, place):
    free = {"cuda": 40 << 30, "cpu": 30 << 30}
    monkeypatch.setattr(placement, "available_bytes", lambda device: free[device.type])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert place_for(size << 30) == place


def test_weights_that_are_not_safetensors_are_merged_in_memory(healed, cut, tmp_path):
    """With the check by logits, and the same values as from file to file."""
    sh.merge(healed[0], tmp_path / "streamed")
    shutil.copytree(cut, tmp_path / "cut")
    torch.save(load_file(cut / "model.safetensors"), tmp_path / "cut" / "pytorch_model.bin")
    (tmp_path / "cut" / "model.safetensors").unlink()
    record = replace(healed[1], weights=stored_digest(tmp_path / "cut"))
    shutil.copytree(healed[0], tmp_path / "adapters")
    (tmp_path / "adapters" / "healing.json").write_bytes(record.to_bytes())
    merge = sh.merge(tmp_path / "adapters", tmp_path / "merged", tmp_path / "cut").merge
    assert merge.check == "logits"
    one, other = tensors(tmp_path / "streamed"), tensors(tmp_path / "merged")
    assert one.keys() == other.keys()
    assert all(int(steps_apart(one[name], other[name]).max()) <= 2 for name in one)
    assert not hasattr(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config, "quantization_config"
    )


def test_a_cut_of_the_hub_is_read_through_its_links(healed, cut, tmp_path, hub, too_large):
    snapshot = hub(cut, "models/cut")
    before = {file.name: file.read_bytes() for file in snapshot.iterdir()}
    sh.merge(healed[0], tmp_path / "merged", "models/cut")
    assert {file.name: file.read_bytes() for file in snapshot.iterdir()} == before
    assert not any(file.is_symlink() for file in (tmp_path / "merged").iterdir())
    sh.merge(healed[0], tmp_path / "local", cut)
    one, other = (tmp_path / name / "model.safetensors" for name in ("merged", "local"))
    assert one.read_bytes() == other.read_bytes()


def test_the_config_and_the_tokenizer_are_the_cuts(healed, cut, tmp_path, too_large):
    record = tmp_path / "cut"
    shutil.copytree(cut, record)
    (record / "healing.json").write_text("of an earlier healing")
    (record / "job").write_text("of a patch")
    sh.merge(healed[0], tmp_path / "merged", record)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "merged" / name).read_bytes() == (cut / name).read_bytes()
    assert Healing.load(tmp_path / "merged").merge.check == "tensors"
    assert not (tmp_path / "merged" / "job").exists()


def test_a_cut_that_is_damaged_is_refused(healed, cut, tmp_path):
    shutil.copytree(cut, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(sh.ModelError):
        sh.merge(healed[0], tmp_path / "merged", tmp_path / "cut")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(sh.OutputError, match="cannot write"):
        sh.merge(healed[0], "/proc/merged")


@pytest.mark.filterwarnings("ignore:.* is multi-threaded:DeprecationWarning")
def test_a_merge_that_is_killed_leaves_nothing_half_written(healed, tmp_path, monkeypatch):
    out, write = tmp_path / "merged", rewriting._write

    def die(*args):
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patching:
        patching.setattr(rewriting, "_write", die)
        child = os.fork()
        if not child:
            with suppress(BaseException):
                sh.merge(healed[0], out)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not out.exists()
    assert all(".partial" in left.name for left in tmp_path.iterdir())
    sh.merge(healed[0], out)
    assert [*tmp_path.iterdir()] == [out]
    assert StoredCheckpoint.open(out).tensors
    assert json.loads((out / "healing.json").read_text())["merge"]["check"] == "logits"


def test_a_cut_in_the_home_folder_is_found(healed, cut, tmp_path, too_large, monkeypatch):
    monkeypatch.setenv("HOME", str(cut.parent))
    sh.merge(healed[0], tmp_path / "merged", f"~/{cut.name}")
    sh.merge(healed[0], tmp_path / "again", cut)
    cards = [(tmp_path / name / "README.md").read_text() for name in ("merged", "again")]
    assert cards[0] == cards[1]


def test_experts_that_are_stored_together_are_merged(words, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config("mixtral")).to(torch.bfloat16).eval()
    _, cut = save_cut(tmp_path, model, words, [3])
    recipe = replace(QUICK, steps=4, dtype="bfloat16", eval_every=4)
    record = sh.heal(cut, TEXTS, tmp_path / "adapters", recipe=recipe, eval_texts=HELD_OUT)
    assert (recipe.dropout, record.recipe.dropout) == (0.05, 0.0)  # which stacks do not take
    merge = sh.merge(tmp_path / "adapters", tmp_path / "merged").merge
    assert merge.difference <= merge.tolerance
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    loss = sh.evaluate_loss(stock, words, HELD_OUT, max_length=16)
    assert loss.nats == pytest.approx(record.after.nats, abs=0.02)


def test_four_bits_are_merged_into_plain_weights(words, tmp_path):
    _, cut = save_cut(tmp_path, tiny_llama().to(torch.bfloat16), words)
    recipe = replace(QUICK, steps=1, warmup_steps=0, dtype="nf4")
    record = sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, eval_texts=HELD_OUT, merge=True)
    assert record.recipe.dtype == "nf4"
    assert record.merge.dtype == "bfloat16"
    assert record.merge.difference < record.merge.tolerance
    assert record.merge.trained_difference > record.merge.difference
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.dtype == torch.bfloat16
    assert not hasattr(stock.config, "quantization_config")


def test_a_patch_and_a_license_are_carried_over(cut, tmp_path):
    carried = tmp_path / "cut"
    shutil.copytree(cut, carried)
    (carried / "shallower_patch.json").write_text('{"method": "refit"}')
    (carried / "LICENSE.txt").write_text("Do as you like.")
    card = (carried / "README.md").read_text()
    (carried / "README.md").write_text(card.replace("---\n", "---\nlicense: apache-2.0\n", 1))
    for name, merge in (("adapters", False), ("merged", True)):
        sh.heal(carried, TEXTS, tmp_path / name, recipe=replace(QUICK, steps=1), merge=merge)
        assert (tmp_path / name / "shallower_patch.json").read_text() == '{"method": "refit"}'
        assert "license: apache-2.0" in (tmp_path / name / "README.md").read_text()
        assert (tmp_path / name / "LICENSE.txt").read_text() == "Do as you like."
