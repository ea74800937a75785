"""The training losses against those of torch, and made inside the forward against all logits."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

import shallower as sh
from shallower.healing.losses import TrainingLoss, mean_loss, summed_loss
from shallower.healing.training import add_adapters, recompute_activations
from shallower.models.decoder import Decoder
from shallower.models.dtypes import computing
from shallower.models.feed_forward import feed_forward_targets
from shallower.models.head import Head
from shallower.settings.recipe import Recipe
from shallower.studies import demo
from tests.conftest import tiny_llama
from tests.families import random_model
from tests.healing.cuts import FACTS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 70, 50, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (3, 70), generator=generator)
    labels[1, 40:] = labels[:, 0] = -100
    as_given = logits.detach().clone()
    loss = summed_loss(logits, labels)
    (0.25 * loss).backward()
    exact = logits.detach().double().requires_grad_()
    expected = functional.cross_entropy(
        exact[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    (0.25 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad.dtype == dtype
    assert torch.equal(logits.detach(), as_given)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert (logits.grad - exact.grad).abs().max() <= tolerance * exact.grad.abs().max()
    assert not logits.grad[1, 39:].any()


def adapted(model, dtype="float32", **options):
    """A model with adapters that are not zero."""
    recipe = Recipe(rank=4, dtype=dtype, dropout=0.0, **options).resolve(FACTS)
    found = add_adapters(model, feed_forward_targets(model), recipe, base="base").train()
    generator = torch.Generator().manual_seed(0)
    for name, weight in found.named_parameters():
        if "lora_B" in name:
            weight.data = 0.02 * torch.randn(weight.shape, generator=generator)
    return found, recipe


def inputs(vocabulary, rows=3, length=21):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = ids[1, length // 2 :] = 0
    labels = ids.where(mask.bool(), -100)
    return {"input_ids": ids, "attention_mask": mask}, labels, int((labels[:, 1:] >= 0).sum())


def trained(model, recipe, *, by_rows, wrapped=None, vocabulary=90):
    """The loss of a step and the gradients of the adapters."""
    given, labels, divisor = inputs(vocabulary)
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    with computing(recipe, torch.device("cpu")):
        loss_of = TrainingLoss(model.get_base_model())
        if by_rows:
            with loss_of.made_inside(labels, torch.tensor(divisor)):
                outputs = (wrapped or model)(**given, use_cache=False)
            assert set(outputs) == {"loss"}
        else:
            outputs = (wrapped or model)(**given, use_cache=False)
        loss = TrainingLoss.of(outputs, labels, torch.tensor(divisor))
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected, tolerance=0.0):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert any(gradient.any() for gradient in expected[1].values())
    scale = max(float(gradient.abs().max()) for gradient in expected[1].values())
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=tolerance * scale)


@pytest.fixture
def few(monkeypatch):
    """Logits of 13 rows at a time, and their gradient, at a vocabulary of 100."""
    monkeypatch.setattr("shallower.models.head.LOGITS_AT_ONCE", 2 * 13 * 100)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_has_the_bits_of_all_logits(few, tied, checkpointing):
    model, recipe = adapted(tiny_llama(3, tie_word_embeddings=tied))
    if checkpointing:
        recompute_activations(model, True)
    assert_same(trained(model, recipe, by_rows=True), trained(model, recipe, by_rows=False))


@pytest.mark.slow
def test_a_step_of_a_real_model_is_that_of_all_logits(monkeypatch):
    """But for rounding: a product of fewer rows may be summed in another order."""
    model, _ = sh.load_model(demo.model_path(), dtype="float32")
    sh.drop_layers(model, [range(4, 29)])
    model, recipe = adapted(model)
    monkeypatch.setattr("shallower.models.head.LOGITS_AT_ONCE", 2 * 20 * 49152)
    expected = trained(model, recipe, by_rows=False, vocabulary=49000)
    assert_same(trained(model, recipe, by_rows=True, vocabulary=49000), expected, 1e-5)


FAMILIES = ["gemma2, two kinds", "gpt2", "granite", "mixtral", "opt, projected", "phi", "cohere"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_a_family(monkeypatch, name):
    """With caps, scales, projections and biases behind the states, and experts before them."""
    monkeypatch.setattr("shallower.models.head.LOGITS_AT_ONCE", 2 * 13 * 128)
    model, recipe = adapted(random_model(name))
    assert_same(trained(model, recipe, by_rows=True), trained(model, recipe, by_rows=False), 1e-6)


def test_bfloat16_gradients_are_not_worse_than_those_of_all_logits():
    torch.manual_seed(0)
    model = tiny_llama(1, initializer_range=0.5).bfloat16()
    head = Head.of(Decoder.of(model))
    states = torch.randn((4, 50, 32)).bfloat16()
    labels = torch.randint(0, 100, (4, 50))
    weight = model.lm_head.weight.double()
    exact = states.double().requires_grad_()
    (summed_loss(exact @ weight.T, labels) / 777).backward()

    def error(loss_of):
        given = states.clone().requires_grad_()
        loss_of(given).backward()
        return float((given.grad.double() - exact.grad).square().sum().sqrt())

    by_rows = error(lambda given: mean_loss(head, given, labels, divisor=777))
    of_all = error(lambda given: summed_loss(model.lm_head(given), labels) / 777)
    assert by_rows <= of_all
    assert by_rows < 0.01 * float(exact.grad.square().sum().sqrt())


def test_products_in_bfloat16_with_float32_adapters(few):
    model, recipe = adapted(tiny_llama(3).bfloat16(), dtype="bfloat16")
    assert_same(trained(model, recipe, by_rows=True), trained(model, recipe, by_rows=False), 0.02)


def test_the_gradients_go_through_what_is_wrapped_around(few, tmp_path):
    """DDP marks and gathers gradients only of what goes through its own forward."""
    model, recipe = adapted(tiny_llama(3))
    expected = trained(model, recipe, by_rows=True)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        for unused in (False, True):
            wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
            gathered = []
            wrapped.register_comm_hook(None, counting(gathered))
            assert_same(trained(model, recipe, by_rows=True, wrapped=wrapped), expected)
            assert sum(gathered) == sum(g.numel() for g in expected[1].values())
            del wrapped
    finally:
        torch.distributed.destroy_process_group()


def counting(gathered):
    """A hook of DDP that notes what would be gathered."""

    def hook(_state, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gathered.append(bucket.buffer().numel())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    return hook


@pytest.mark.parametrize("trained_too", ["lm_head", "model.norm", "model.embed_tokens"])
def test_a_head_that_is_trained_gets_its_gradient(trained_too):
    model, _ = adapted(tiny_llama(3))
    model.get_base_model().get_submodule(trained_too).requires_grad_(True)
    given, labels, divisor = inputs(90)
    loss_of = TrainingLoss(model.get_base_model())
    with loss_of.made_inside(labels, divisor):
        outputs = model(**given, use_cache=False)
    TrainingLoss.of(outputs, labels, divisor).backward()
    assert model.get_base_model().get_submodule(trained_too).weight.grad.any()


class WithInputs(LlamaForCausalLM):
    """A model whose logits depend on the token itself, beside the states."""

    def forward(self, input_ids, **options):
        output = super().forward(input_ids=input_ids, **options)
        output["logits"] = output.logits + torch.nn.functional.one_hot(input_ids, 100)
        return output


def test_a_model_whose_head_takes_more_than_states_is_trained_by_all_logits():
    torch.manual_seed(0)
    model, _ = adapted(WithInputs(tiny_llama(3).config))
    given, labels, divisor = inputs(90)
    loss_of = TrainingLoss(model.get_base_model())
    with loss_of.made_inside(labels, divisor):
        outputs = model(**given, use_cache=False)
    expected = summed_loss(outputs.logits, labels) / divisor
    assert TrainingLoss.of(outputs, labels, divisor) == expected


def test_the_model_is_as_it_was_afterwards():
    model, recipe = adapted(tiny_llama(3))
    before = copy.deepcopy(model.state_dict())
    trained(model, recipe, by_rows=True)
    given, labels, divisor = inputs(90)
    loss_of = TrainingLoss(model.get_base_model())
    with pytest.raises(IndexError), loss_of.made_inside(labels, divisor):
        model(**{**given, "input_ids": given["input_ids"] + 100})
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
