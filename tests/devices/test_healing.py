"""The forwards and losses of a training, on fake CUDA devices; backward on fake CPU tensors."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from shallower.cutting.in_model import drop_layers
from shallower.errors import ModelError
from shallower.healing import training
from shallower.healing.losses import TrainingLoss, mean_loss, summed_loss, teach
from shallower.healing.training import add_adapters, recompute_activations
from shallower.models.decoder import Decoder
from shallower.models.dtypes import computing
from shallower.models.feed_forward import feed_forward_targets
from shallower.models.head import Head
from shallower.settings.recipe import ModelFacts, Recipe
from shallower.values.plan import Plan
from tests.devices.batches import inputs
from tests.devices.conftest import STAGES, on_devices
from tests.devices.stage import WIDTH, Stage, devices_of

PLAN = Plan.of(6, [1, 4])
"""Two blocks, so that on two devices the cut is joined on both."""


def recipe(**options):
    facts = ModelFacts("llama", WIDTH, 32, 4096, 32000)
    return Recipe(dtype="bfloat16", steps=10, **options).resolve(facts)


def adapted(stage):
    """A cut with adapters, ready for training."""
    cut = stage.llama(6)
    drop_layers(cut, PLAN.dropped)
    model = add_adapters(cut, feed_forward_targets(cut), recipe(), base="base")
    return cut, model.train()


def loss_of(cut, model, given, lesson=None):
    """The loss of a forward, as the Trainer gets it."""
    words = {name: value for name, value in given.items() if name != "labels"}
    divisor = torch.tensor(17, device=given["labels"].device)
    with computing(recipe(), Decoder.of(cut).device):
        loss = TrainingLoss(cut)
        with loss.made_inside(given["labels"], divisor, lesson):
            outputs = model(**words, use_cache=False)
        assert set(outputs) == {"loss"}  # and no logits
        return loss.of(outputs, given["labels"], divisor)


def refused(stage):
    """Whether adapters are refused, as they are where layers are offloaded."""
    if stage.offloading:
        with stage.open(), pytest.raises(ModelError, match="are kept in CPU memory"):
            adapted(stage)
    return stage.offloading


@on_devices
def test_the_loss_of_a_model_with_adapters(stage):
    """As it is, and with gradient checkpointing."""
    if refused(stage):
        return
    with stage.open():
        cut, model = adapted(stage)
        weights = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in weights} == {torch.float32}
        assert devices_of(weights) == {f"cuda:{i}" for i in range(stage.devices)}
        for recompute in (False, True):
            recompute_activations(cut, recompute)
            given = inputs("cuda:0")
            if recompute:  # labels may lie elsewhere
                given["labels"] = given["labels"].cpu()
            loss = loss_of(cut, model, given)
            assert (loss.dtype, loss.requires_grad) == (torch.float32, True)
            assert loss.device == given["labels"].device
        logits = torch.empty(3, 9, 100, device=stage.last, requires_grad=True)
        assert summed_loss(logits, given["labels"]).device == stage.last


@pytest.mark.slow
@pytest.mark.parametrize("teachers", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("by_rows", [True, False])
def test_the_divergence_from_a_teacher(stage, teachers, by_rows):
    if refused(stage):
        return
    with stage.open():
        cut, model = adapted(stage)
        teacher = Head.of(Decoder.of(teachers.model()))
        if not by_rows:
            teacher = teacher.whole()
        given = inputs("cuda:0")
        with computing(recipe(), Decoder.of(cut).device):
            lesson = teach(teacher, given["input_ids"], given["attention_mask"])
        loss = loss_of(cut, model, given, lesson=lesson)
        assert (loss.dtype, loss.requires_grad) == (torch.float32, True)
        size = cut.config.vocab_size
        logits = torch.empty(3, 9, size, device=stage.last, requires_grad=True)
        head = Head.of(Decoder.of(cut))
        states = torch.empty(3, 9, cut.config.hidden_size, device=stage.last, dtype=cut.dtype)
        for place in {torch.device("cuda:0"), stage.last}:
            elsewhere = lambda rows, place=place: torch.empty(  # noqa: E731
                len(range(27)[rows]), size, device=place
            )
            assert summed_loss(logits, given["labels"], elsewhere).device == stage.last
            loss = mean_loss(head, states, given["labels"], divisor=9, lesson=elsewhere)
            assert loss.device == stage.last


def test_the_divergence_from_the_whole_logits_of_a_teacher():
    two = STAGES["two devices"]
    test_the_divergence_from_a_teacher(two, two, by_rows=False)


@contextmanager
def trainer(stage):
    """Our Trainer of a cut and its teacher, and the inputs of a step."""
    with stage.open(), tempfile.TemporaryDirectory() as folder:
        cut, model = adapted(stage)
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True,
            remove_unused_columns=False, label_names=["labels"],
        )  # fmt: skip
        vars(arguments)["_setup_devices"] = stage.first  # as where there is CUDA
        if stage.devices == 1:
            cut.hf_device_map = {"": 0}
        teacher = Head.of(Decoder.of(stage.model()))
        given = training.Training(model, [], recipe(objective="kd"), Path(folder), teacher=teacher)
        ours = training._Trainer(given, arguments, [], [])
        yield ours, model, inputs(stage.first), torch.tensor(17, device=stage.first)


@pytest.mark.slow
@on_devices
def test_the_loss_of_the_trainer(stage):
    if refused(stage):
        return
    with trainer(stage) as (ours, model, given, count):
        with ours.compute_loss_context_manager():
            loss = ours.compute_loss(model, given, num_items_in_batch=count)
        assert (loss.device, loss.requires_grad) == (stage.first, True)


def test_a_step_of_the_trainer():
    with trainer(Stage(0)) as (ours, model, given, count):
        ours.training_step(model, given, count)
        assert_gradients(model)


def assert_gradients(model):
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 2 * 3 * len(PLAN.survivors)
    assert all(grad is not None and grad.dtype == torch.float32 for grad in gradients)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert not [p for p in frozen if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_backward(recompute):
    """As it is, and with gradient checkpointing."""
    stage = Stage(0)
    with stage.open():
        cut, model = adapted(stage)
        recompute_activations(cut, recompute)
        loss_of(cut, model, inputs("cpu")).backward()
        assert_gradients(model)
