"""Names of tensors, and the config, follow the survivors."""

import pytest

import shallower as sh
from shallower import ModelError
from shallower.cutting.tensor_names import check_alike, find_prefix
from tests.cutting.checkpoints import DROPPED, edit_json, read_json


# What lies beside the weights.
def test_the_config_is_edited_and_not_rewritten(copied, tmp_path):
    edit_json(
        copied / "config.json", custom={"of": ["mine", 1]}, per_layer=[0, 1, 2, 3, 4, 5], é="ü"
    )
    before = read_json(copied / "config.json")
    sh.prune(copied, DROPPED, tmp_path / "cut")
    after = read_json(tmp_path / "cut" / "config.json")
    assert list(after) == list(before)
    assert after == {**before, "num_hidden_layers": 3, "per_layer": [0, 2, 5]}


def test_layers_are_found_by_the_names_of_tensors():
    def named(*prefixes, count=3):
        return [f"{prefix}.{i}.w" for prefix in prefixes for i in range(count)]

    path = "model.language_model.layers"
    for prefixes, found in [
        (["model.language_model.layers", "layers"], "model.language_model.layers."),
        (["layers", "vision.blocks"], "layers."),
        (["language_model.model.layers", "vision.blocks"], "language_model.model.layers."),
    ]:
        assert find_prefix(named(*prefixes), path, 3) == found
    with pytest.raises(ModelError, match=r"no tensors of the layers .*: a.layers., b.layers."):
        find_prefix(named("a.layers", "b.layers"), path, 3)
    with pytest.raises(ModelError, match="nothing"):
        find_prefix(["model.norm.weight"], path, 3)


def test_layers_may_be_quantised_or_not_but_not_incomplete():
    packed = {"q.qweight": "I32", "q.scales": "F16"}
    plain = {"q.weight": "BF16"}
    fp8 = {"q.weight": "F8_E4M3", "q.weight_scale_inv": "F32"}
    nf4 = {"q.weight": "U8", "q.weight.absmax": "F32", "q.weight.quant_state.nf4": "U8"}
    for layers in ([packed, plain], [plain, fp8], [nf4, plain]):
        check_alike(layers, ["same", "same"])
    for whole in (packed, fp8, nf4):
        poor = dict(list(whole.items())[:1])
        with pytest.raises(ModelError, match="layer 1 lacks the tensor q"):
            check_alike([whole, poor], ["same", "same"])
        with pytest.raises(ModelError, match="layer 1 lacks the tensor"):
            check_alike([{**whole, "k.weight": "F32"}, whole], ["same", "same"])
        check_alike([whole, poor], ["attention", "other"])
