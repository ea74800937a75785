"""Statistics of experts, against a float64 twin of what the experts' own call was given."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shallower as sh
from shallower.experts.hooks import ExpertHooks, Sent, weight_ratios
from shallower.experts.statistics import VALUES, ExpertStatistics
from shallower.models.architecture import find_layers
from shallower.models.experts import find_experts
from shallower.scanning.hidden_states import stream
from shallower.texts.batches import Batch
from shallower.values.experts import Routing
from tests.conftest import mostly_slow
from tests.cutting.mixtures import mixture
from tests.documents import documents
from tests.families import MIXTURES

FAST = ["dbrx", "deepseek_v3", "gpt_oss", "llama4_text", "mixtral", "qwen2_moe"]
"""Experts that are called otherwise, routers that differ, biases, shared experts."""

BY_SIDE = pytest.mark.parametrize(
    ("name", "side"),
    mostly_slow(
        itertools.product(FAST, ["left", "right"]), [*zip(FAST, 3 * ["left", "right"], strict=True)]
    ),
)
"""Each with padding on one side by day, on both at night."""

WITHOUT_STREAM = {
    "afmoe", "beam", "cohere2_moe", "dbrx", "flex_olmo", "gemma4_text, experts",
    "granitemoehybrid", "inkling2_loop_text", "inkling2_text", "kolibri1", "minimax",
    "qwen4_exp_text",
}  # fmt: skip
"""Families whose layers do not just add their experts' block to the stream, as far as is seen."""

UNSCANNED = {"bailing_hybrid", "hy_v4"}
"""Families that no scan takes: one fails on padding, one has several streams."""

LENGTHS = (9, 4, 7)


def batch(side="right", texts=(0, 1, 2), seed=0):
    """Some of three texts in a batch, padded on a side."""
    generator = np.random.default_rng(seed)
    tokens = [generator.integers(3, 100, length) for length in LENGTHS]
    width = max(LENGTHS[text] for text in texts)
    ids, mask = np.zeros((2, len(texts), width), np.int64)
    for row, text in enumerate(texts):
        length = LENGTHS[text]
        place = slice(width - length, width) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = tokens[text], 1
    return Batch(ids, mask, np.array(texts))


def observed(model, *batches):
    with ExpertHooks(model) as hooks:
        for part in stream(model, batches, experts=hooks):
            del part
    return hooks.statistics


def calls_of(model, seen):
    """By layer what the experts of a model are given in a batch, and what they give."""
    calls, handles = {}, []
    for one in find_experts(model):

        def keep(_module, args, kwargs, output, layer=one.layer):
            calls[layer] = [*args, *kwargs.values()], output

        handles.append(one.module.register_forward_hook(keep, with_kwargs=True))
    with torch.inference_mode():
        model(
            input_ids=torch.from_numpy(seen.input_ids),
            attention_mask=torch.from_numpy(seen.attention_mask),
            use_cache=False,
        )
    for handle in handles:
        handle.remove()
    return calls


def activation(experts):
    inner = getattr(experts, "mlp", experts)
    return next(
        getattr(inner, name) for name in ("act_fn", "activation_fn") if hasattr(inner, name)
    )


def output_of(experts, expert, state):
    """One expert's output at a token in float64, by its weights, (D,)."""
    weights = {name: value.detach().double() for name, value in experts.named_parameters()}
    if "mlp.w1" in weights:  # DBRX
        rows = experts.ffn_hidden_size
        gate, up, down = (
            weights[f"mlp.{name}"].view(-1, rows, weights["mlp.w1"].shape[1])[expert]
            for name in ("w1", "v1", "w2")
        )
        return (activation(experts)(gate @ state) * (up @ state)) @ down
    both, down = weights["gate_up_proj"][expert], weights["down_proj"][expert]
    if "gate_up_proj_bias" in weights:  # gpt-oss: interleaved, clamped, transposed
        made = state @ both + weights["gate_up_proj_bias"][expert]
        gate, up = (
            made[::2].clamp(max=experts.limit),
            made[1::2].clamp(-experts.limit, experts.limit),
        )
        inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        return inner @ down + weights["down_proj_bias"][expert]
    if type(experts).__name__ == "Llama4TextExperts":  # transposed
        gate, up = (state @ both).chunk(2)
        return (up * activation(experts)(gate)) @ down
    gate, up = (both @ state).chunk(2)
    return down @ (activation(experts)(gate) * up)


def twin(model, seen):
    """The sums of a batch by plain loops, (M, E) and (M, E, 5): all of VALUES but the last."""
    given = calls_of(model, seen)
    tokens = np.flatnonzero(seen.attention_mask)
    found = find_experts(model)
    counts = np.zeros((len(found), found[0].num_experts))
    values = np.zeros((*counts.shape, 5))
    for place, one in enumerate(found):
        states, _ = given[one.layer]
        if len(states) == 1:
            calls = of_inputs(states[0], one.num_experts, tokens)
        else:
            calls = of_outputs(states, tokens)
        for expert, state, gate, is_of_output in calls:
            norm = float(output_of(one.module, expert, state).norm())
            counts[place, expert] += 1
            gated = gate * norm if is_of_output else norm
            values[place, expert] += (gate, norm, norm**2, gated, gated**2)
    return counts, values


def of_outputs(seen, tokens):
    states, chosen, weights = (one.reshape(-1, one.shape[-1]) for one in seen)
    for token in tokens:
        for expert, gate in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            yield expert, states[token].double(), gate, True


def of_inputs(states, num_experts, tokens):
    """Llama-4's are given every token for every expert, zeros for those that are not chosen."""
    for expert, some in enumerate(states.view(num_experts, -1, states.shape[-1])):
        for token in tokens:
            if some[token].any():
                yield expert, some[token].double(), np.nan, False


@BY_SIDE
def test_statistics_are_those_of_a_float64_twin(name, side):
    model, seen = mixture(name), batch(side)
    found = observed(model, seen)
    if side == "left":  # a plain forward counts positions from the padding on
        seen = batch("right")
    counts, values = twin(model, seen)
    assert np.array_equal(found.counts, counts)
    for place, value in enumerate(VALUES[:5]):
        if not np.isnan(values[..., place]).any():
            np.testing.assert_allclose(
                found.total(value), values[..., place], rtol=2e-5, atol=1e-7, err_msg=value
            )
    if name == "llama4_text":
        assert (found.total("gate")[found.counts > 0] > 0).all()


@pytest.mark.parametrize("name", FAST)
def test_products_are_those_of_what_experts_add(name):
    """By plain loops over tokens; and of an expert with itself the squares that are kept beside."""
    model, seen = mixture(name), batch()
    found = observed(model, seen)
    products = found.products()
    assert np.array_equal(products, products.transpose(0, 2, 1))
    np.testing.assert_allclose(
        np.diagonal(products, axis1=1, axis2=2), found.total("gated_square"), rtol=1e-5, atol=1e-12
    )
    one = find_experts(model)[-1]
    states, output = calls_of(model, seen)[one.layer]
    tokens, width = np.flatnonzero(seen.attention_mask), output.shape[-1]
    added = np.zeros((seen.attention_mask.size, one.num_experts, width))
    if len(states) == 1:
        by_expert = states[0].view(one.num_experts, -1, width).double()
        for expert, token in itertools.product(range(one.num_experts), tokens):
            if by_expert[expert, token].any():
                added[token, expert] = output_of(one.module, expert, by_expert[expert, token])
        output = output.view(one.num_experts, -1, width).sum(0)
    else:
        rows, chosen, weights = (one.reshape(-1, one.shape[-1]) for one in states)
        for token, place in itertools.product(tokens, range(chosen.shape[1])):
            alone = output_of(one.module, int(chosen[token, place]), rows[token].double())
            added[token, chosen[token, place]] = float(weights[token, place]) * alone
    wanted = np.einsum("tid,tjd->ij", added, added)
    np.testing.assert_allclose(products[-1], wanted, rtol=2e-5, atol=1e-6 * wanted.max())
    whole = output.reshape(-1, width)[tokens].double().numpy()  # all left out: nothing stays
    np.testing.assert_allclose(products[-1].sum(), (whole**2).sum(), rtol=1e-4)


@pytest.mark.parametrize("name", FAST)
def test_how_far_the_stream_is_turned(name):
    """By hooks on the norm before a block alone, and plain loops."""
    model, seen = mixture(name), batch()
    found = observed(model, seen)
    assert found.has_stream == (name not in WITHOUT_STREAM)
    if not found.has_stream:
        with pytest.raises(sh.ExpertsError, match="Choose another criterion than easy-ep"):
            found.total("moved")
        return
    one = find_experts(model)[0]
    before = []
    layer = find_layers(model).modules[one.layer]
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    states, output = calls_of(model, seen)[one.layer]
    if len(states) == 1:
        output = output.view(one.num_experts, -1, output.shape[-1]).sum(0)
    x, y = before[0].flatten(0, 1).double().numpy(), output.double().numpy()
    tokens = np.flatnonzero(seen.attention_mask)
    calls = (
        of_inputs(states[0], one.num_experts, tokens)
        if len(states) == 1
        else of_outputs(states, tokens)
    )
    at = {tuple(state.double().tolist()): token for token, state in enumerate(_rows(states, one))}
    wanted = np.zeros(one.num_experts)
    for expert, state, gate, is_of_output in calls:
        token = at[tuple(state.tolist())] if is_of_output else _token(states[0], one, expert, state)
        behind = x[token] + y[token]
        cosine = x[token] @ behind / np.linalg.norm(x[token]) / np.linalg.norm(behind)
        norm = float(output_of(one.module, expert, state).norm())
        wanted[expert] += (1 - cosine) * (gate * norm if is_of_output else norm)
    np.testing.assert_allclose(found.total("moved")[0], wanted, rtol=1e-4, atol=1e-9)
    assert wanted.max() > 1e-6


def _rows(states, one):
    return states[0].reshape(-1, states[0].shape[-1])


def _token(states, one, expert, state):
    rows = states.view(one.num_experts, -1, states.shape[-1])[expert].double()
    return int((rows == state).all(-1).nonzero()[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MIXTURES) - UNSCANNED))
def test_every_mixture_can_be_observed(name):
    """Its states are those without being observed, and every token is counted k times."""
    model, seen = mixture(name), batch()
    plain = [part.states.clone() for part in stream(model, [seen])]
    with ExpertHooks(model) as hooks:
        watched = [part.states.clone() for part in stream(model, [seen], experts=hooks)]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    found = hooks.statistics
    assert (found.counts.sum(1) == found.routing.chosen * sum(LENGTHS)).all()
    assert found.has_stream == (name not in WITHOUT_STREAM)
    assert found.left_out == 0
    assert not np.isnan(found.aimer).any()


def same_bits(one, other):
    sums = ((found.sums.to_bytes(), found.pairs.to_bytes()) for found in (one, other))
    return one.header() == other.header() and len({*sums}) == 1


def test_texts_in_any_order_and_merged_in_any_parts_have_the_same_bits():
    model = mixture("mixtral")
    alone = [batch(texts=[text]) for text in range(3)]
    first = observed(model, *alone)
    assert same_bits(first, observed(model, *reversed(alone)))
    merged = observed(model, alone[2])
    merged.merge(observed(model, *alone[:2]))
    assert same_bits(first, merged)
    assert first.num_texts == 3


@given(st.data())
def test_the_same_outputs_have_the_same_bits_however_texts_are_batched(data):
    """What the forward gives of tokens, in batches of any size, order and padding."""
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    texts = [_sent(generator, length) for length in lengths]
    batches = data.draw(st.lists(st.permutations(range(len(texts))), min_size=2, max_size=2))
    found = []
    for order in batches:
        statistics = ExpertStatistics([0], Routing(4, 2))
        size = data.draw(st.integers(1, len(texts)))
        for start in range(0, len(texts), size):
            some = [texts[text] for text in order[start : start + size]]
            rows = np.repeat(np.arange(len(some)), [len(one.experts) for one in some])
            values = (torch.cat([getattr(one, name) for one in some]) for name in PARTS)
            products = torch.cat([one.products for one in some])
            sent = Sent(*values, multiplies=True, products=products)
            of = rows, len(some), 4
            statistics.add(0, *sent.sums(*of), pairs=sent.pairs(*of))
        found.append(statistics)
    assert same_bits(*found)
    assert found[0].counts.sum() == 2 * sum(lengths)


PARTS = ("experts", "gates", "norms", "turned")


def _sent(generator, tokens):
    """Made-up outputs of two of four experts at every token of a text."""
    chosen = np.argsort(generator.random((tokens, 4)))[:, :2]
    values = (generator.lognormal(size=shape) for shape in ((tokens, 2), (tokens, 2), tokens))
    products = torch.from_numpy(generator.normal(size=(tokens, 2, 2)))
    return Sent(*map(torch.from_numpy, (chosen, *values)), multiplies=True, products=products)


@BY_SIDE
def test_another_batching_is_equal_but_for_the_rounding_of_the_forward(name, side):
    model = mixture(name)
    alone = observed(model, *(batch(texts=[text]) for text in range(3)))
    together = observed(model, batch(side))
    assert np.array_equal(alone.counts, together.counts)
    for moment in ("sums", "squares", "products"):
        one, other = getattr(alone.sums, moment)(), getattr(together.sums, moment)()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-8)


def test_errors_are_by_text():
    """Against the formulas on the sums of single texts."""
    model = mixture("mixtral")
    parts = [
        observed(model, batch(texts=[text], seed=seed)) for seed in range(3) for text in range(3)
    ]
    whole = parts[0].copy()
    for part in parts[1:]:
        whole.merge(part)
    counts = np.stack([part.counts for part in parts]).astype(float)
    num = len(parts)
    for value in VALUES:
        sums = np.stack([part.total(value) for part in parts])
        spread = ((sums - sums.mean(0)) ** 2).sum(0) * num / (num - 1)
        np.testing.assert_allclose(whole.total_stderr(value), np.sqrt(spread), rtol=1e-6)
        ratio = sums.sum(0) / counts.sum(0)
        spread = ((sums - ratio * counts) ** 2).sum(0) * num / (num - 1)
        wanted = np.sqrt(spread) / counts.sum(0)
        np.testing.assert_allclose(whole.mean_stderr(value), wanted, rtol=1e-5, atol=1e-12)
    spread = ((counts - counts.mean(0)) ** 2).sum(0) * num / (num - 1)
    np.testing.assert_allclose(whole.total_stderr("count"), np.sqrt(spread), rtol=1e-6)
    assert np.isnan(parts[0].mean_stderr("norm")).all()


def test_a_mean_over_one_text_of_several_has_no_error():
    """A ratio of one text's sums has no residual, and that is no certainty."""
    found = ExpertStatistics([0], Routing(2, 1))
    values = np.random.default_rng(0).lognormal(size=(3, 2, len(VALUES)))
    counts = np.array([[5, 2], [0, 4], [0, 0]])
    found.add(0, counts, values * (counts > 0)[..., None])
    assert np.array_equal(np.isnan(found.mean_stderr("norm")), [[True, False]])
    assert np.isfinite(found.total_stderr("norm")).all()


def test_a_forward_that_fails_counts_nothing():
    model = mixture("mixtral")
    fails = find_layers(model).modules[-1].register_forward_pre_hook(_fail_once([]))
    hooks = ExpertHooks(model)
    with hooks:
        with pytest.warns(UserWarning, match="not enough memory for 3 texts"):
            list(stream(model, [batch()], experts=hooks))
        fails.remove()
    assert hooks.statistics.counts.sum() == 8 * 2 * sum(LENGTHS)
    assert not hooks.is_watching


def _fail_once(done):
    def fail(*_):
        if not done:
            done.append(True)
            raise torch.OutOfMemoryError

    return fail


def test_a_state_that_is_no_number_is_left_out_and_counted():
    model = mixture("mixtral")
    with torch.no_grad():
        find_experts(model)[-1].module.down_proj[2] = torch.nan
    found = observed(model, batch())
    assert found.counts[-1, 2] == 0
    assert found.left_out > 0
    assert np.isfinite(found.sums.sums()).all()


def test_hooks_leave_nothing_behind():
    model = mixture("mixtral")
    before = [(name, len(one._forward_hooks)) for name, one in model.named_modules()]
    observed(model, batch())
    assert [(name, len(one._forward_hooks)) for name, one in model.named_modules()] == before


def test_a_model_without_experts_is_refused(llama, words):
    with pytest.raises(sh.ModelError, match="no layer with routed experts"):
        sh.scan(llama, words, documents(3), experts=True)


@pytest.mark.parametrize(
    ("factor", "whole"), [(1e30, False), (1e-30, False), (0, True), (torch.nan, True)]
)
def test_ratios_of_extreme_weights_can_be_stored(factor, whole):
    one = find_experts(mixture("mixtral"))[0]
    plain = weight_ratios(one.module, one.num_experts)[2]
    with torch.no_grad():
        for weight in one.module.parameters():
            weight[2] *= factor
    ratio = weight_ratios(one.module, one.num_experts)[2]
    assert ratio == pytest.approx(1 if whole else plain, rel=1e-6)


@pytest.mark.parametrize("name", FAST)
def test_ratios_are_of_all_weights_of_an_expert(name):
    for one in find_experts(mixture(name)):
        weights = [
            weight.detach().double().numpy().reshape(one.num_experts, -1)
            for key, weight in one.module.named_parameters()
            if "bias" not in key
        ]
        flat = np.concatenate(weights, axis=1)
        wanted = np.abs(flat).mean(1) / np.sqrt((flat**2).mean(1))
        np.testing.assert_allclose(weight_ratios(one.module, one.num_experts), wanted, rtol=1e-6)


def test_what_cannot_be_merged_is_refused():
    found = observed(mixture("mixtral"), batch())
    other = observed(mixture("mixtral", num_experts=5), batch())
    with pytest.raises(sh.ScanError, match="other layers or another router"):
        found.merge(other)
    other = found.copy()
    other.routing = dataclasses.replace(other.routing, chosen=1)
    with pytest.raises(sh.ScanError, match="another router"):
        found.merge(other)
    with pytest.raises(sh.ExpertsError, match="unknown statistic 'g': expected gate"):
        found.total("g")
