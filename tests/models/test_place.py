"""What the place of a model says without torch, by what transformers makes of it."""

import pytest
from transformers import AutoConfig

from shallower.models.loading import layers_of
from shallower.models.place import check_place
from tests import families
from tests.conftest import mostly_slow

QUICK = ("bart", "dory", "gemma3", "gpt2", "llama", "longcat_flash")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", mostly_slow(families.families(), QUICK))
def test_layers_are_counted_as_transformers_counts_them(name, tmp_path):
    families.small_config(name).save_pretrained(tmp_path)
    count = check_place(tmp_path)
    assert count in (None, layers_of(AutoConfig.from_pretrained(tmp_path)))
    if name == "llama":
        assert count == AutoConfig.from_pretrained(tmp_path).num_hidden_layers
