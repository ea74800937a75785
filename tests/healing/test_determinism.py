"""Deterministic algorithms, and what they need of the process."""

import os
import warnings
from contextlib import suppress

import pytest
import torch

from shallower.healing.training import deterministic
from shallower.models import dtypes

CPU = torch.device("cpu")


def test_the_body_is_deterministic_and_the_process_as_before(monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    names = ("FLASH_ATTENTION_DETERMINISTIC", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG")
    before = [os.environ.get(name) for name in names]
    with suppress(KeyError), deterministic(CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
        assert "CUDA_LAUNCH_BLOCKING" not in os.environ
        raise KeyError
    assert [os.environ.get(name) for name in names] == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_where_cublas_began_too_early_a_warning_names_the_variable(monkeypatch):
    """Torch's own words, as of a product on a GPU."""
    words = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` "
        "or `at::Context::setDeterministicAlgorithms(true)`, but this operation is not "
        "deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable deterministic "
        "behavior in this case, you must set an environment variable before running your PyTorch "
        "application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8."
    )

    def product(*_args):
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(words)
        warnings.warn(words, stacklevel=2)

    monkeypatch.setattr(torch, "mm", product)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with deterministic(CPU):
                torch.mm()
                torch.mm()
        assert "Set CUBLAS_WORKSPACE_CONFIG=:4096:8" in str(told[0].message)
        assert len(told) == 1
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_other_errors_of_a_product_are_not_hidden(monkeypatch):
    def product(*_args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "mm", product)
    with pytest.raises(RuntimeError, match="illegal memory access"), deterministic(CPU):
        pass


@pytest.mark.parametrize("wanted", [None, ":16:8"])
def test_the_variable_is_set_before_a_model_is_anywhere(monkeypatch, wanted):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", wanted or "")
    if not wanted:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    dtypes.choose_device_map("cpu")
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == wanted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device_map in ("cuda:0", None):
        assert dtypes.choose_device_map(device_map) == (device_map or "auto")
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (wanted or ":4096:8")
