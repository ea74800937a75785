"""What a cut saves, by ``savings`` of both models: counted, forecast, or measured on demand."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cutting.plans import agreed_plan
from ..errors import ModelError, naming_extras
from ..models.dtypes import (
    QUANTISED,
    Dtype,
    check_dtype,
    choose_device_map,
    choose_dtype,
    stored_quantisation,
)
from ..models.place import check_place
from ..models.source import ModelSource
from ..results.gain import Gain, MeasuredGain, Sizes
from ..savings.devices import DEVICES, HERE, Device, find_device
from ..values.layers import Layers
from ..values.plan import Plan
from ..values.provenance import versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ..cutting.plans import NamedExperts
    from ..savings.account import Account, Operation

CONTEXT = 2048
"""Tokens that a text has before it is continued, at most."""

GAIN_DEVICE = "a100-80"
"""The GPU that pages forecast the time of a token for."""


@naming_extras("counting what a cut saves")
def gain(
    model: "PreTrainedModel | PretrainedConfig | ModelSource | str | Path",
    drop: Plan | Layers,
    *,
    experts: "NamedExperts | None" = None,
    device: str | None = None,
    context: int | None = None,
    batch: int = 1,
    dtype: Dtype = "auto",
    measure: bool = False,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> Gain:
    """Count and forecast what a cut saves: parameters, bytes, operations and time.

    Both models are built from their configs without weights, and their own forwards are counted
    operation by operation. The time of an operation is that of its arithmetic or of its bytes,
    whichever is longer (the roofline of LLM-Viewer, 2402.16363). That is a bound that kernels come
    near to, and better for ratios than for milliseconds.

    Args:
        model: the folder, the hub id or the ``.gguf`` file of the uncut model; or its config, or
            the model in memory.
        drop: the layers that go: a plan, or blocks, ranges or indices, 0-based.
        experts: routed experts that go of the layers that stay, as for :func:`shallower.prune`; the
            layers may be none then, ``()``.
        device: one GPU of the table, such as ``a100-80``, or ``here`` for this machine, which is
            measured in a few seconds; by default all of them.
        context: tokens that a text has before it is continued; by default 2,048, or as many as the
            model has learned positions for.
        batch: texts in a forward.
        dtype: of the weights. ``auto`` is that of a model in memory, or of one that is stored by
            bitsandbytes; else the one that the model would be loaded in here, if this machine is
            asked for or measured, or bfloat16.
        measure: load the model, and time it here with and without the layers, in turns.
        gguf_file: a GGUF file in the folder or hub repository.
        trust_remote_code: run code that comes with the model.

    Returns:
        Sizes before and after, forecasts, and measurements.

    Raises:
        ModelError: the model or its config cannot be read, its config cannot describe the cut, or
            there is no such device, dtype, context or batch.
        LayersError, PlanError: the layers are not those of the model, or all of them.
        ExpertsError: experts that are not there, or that a router cannot do without.

    Example:
        >>> from transformers import LlamaConfig
        >>> llama = LlamaConfig(num_hidden_layers=8)  # the widths of Llama-2-7B
        >>> found = sh.gain(llama, [range(4, 6)], device="a100-80")
        >>> found.after.parameters / found.before.parameters
        0.78...
        >>> round(1e3 * found.on("a100-80").decode_before, 2)  # ms a token
        1.85
    """
    check_dtype(dtype)
    for name, value in (("context", 1 if context is None else context), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{name} = {value!r}: expected at least 1 ({name}, --{name})")
    devices = _named(device)
    if isinstance(model, str | Path):
        model = ModelSource(model, "auto", None, gguf_file, trust_remote_code)
    if isinstance(model, ModelSource) and (count := check_place(model.path, model.gguf_file)):
        _ = experts or agreed_plan(str(model), count, drop)
    subject = _GainModel.of(model)
    if measure and subject.source is None and subject.loaded is None:
        raise ModelError(
            "a config has no weights that could be timed: measure a model (measure, --measure)"
        )
    chosen = subject.dtype(dtype, here=measure or device == HERE)
    plan, after, room = subject.cut(drop, experts)
    context = min(CONTEXT, room) if context is None else context
    how: Any = {"dtype": chosen, "context": context, "batch": batch, "devices": devices}
    found = _forecast(subject, plan, after, **how)
    return replace(found, measured=_measured(subject, found, plan)) if measure else found


def _named(device: str | None) -> list[Device | None]:
    """The devices to forecast for; None is this machine, which is measured later."""
    if device is None:
        return [*DEVICES.values(), None]
    return [None if device == HERE else find_device(device)]


@dataclass(frozen=True, slots=True)
class _GainModel:
    """The model in question: its config, and the way to its weights if there is one."""

    name: str
    config: "PretrainedConfig"
    source: ModelSource | None
    loaded: "PreTrainedModel | None"

    @classmethod
    def of(cls, model: Any) -> "_GainModel":
        if isinstance(model, ModelSource):
            from ..models.loading import read_config

            here = Path(model.path).expanduser().exists()
            name = model.gguf_file or (Path(model.path).name if here else str(model.path))
            config = read_config(model.path, model.gguf_file, model.trust_remote_code)
            return cls(name, config, model, None)
        from transformers import PretrainedConfig, PreTrainedModel

        if isinstance(model, PretrainedConfig):
            return cls(model.model_type, model, None, None)
        if not isinstance(model, PreTrainedModel):
            raise ModelError(
                f"a {type(model).__name__} is no model: expected a place, a config or a model of "
                f"transformers"
            )
        from ..models.identity import model_name

        return cls(model_name(model), model.config, None, model)

    def dtype(self, dtype: Dtype, *, here: bool) -> str:
        if self.loaded is not None:
            from ..models.identity import stored_dtype

            return stored_dtype(self.loaded) if dtype == "auto" else dtype
        if dtype != "auto":
            return dtype
        stored = stored_quantisation(getattr(self.config, "quantization_config", None))
        if stored in QUANTISED:
            return stored
        return choose_dtype(choose_device_map(None))[0] if here else "bfloat16"

    def cut(
        self, drop: Plan | Layers, named: "NamedExperts | None"
    ) -> "tuple[Plan, PretrainedConfig, int]":
        """The plan that is carried out, the config of what it leaves, and the longest context."""
        import torch

        from ..cutting.experts import config_left
        from ..memory.rehearsal import build_empty
        from ..models.architecture import find_layers
        from ..models.experts import find_experts
        from ..savings.account import longest_context

        built = build_empty(self.config, torch.bfloat16)
        plan = agreed_plan(
            self.name,
            len(find_layers(built)),
            drop,
            experts=named,
            count_experts=lambda: find_experts(built)[0].num_experts,
        )
        self._check(plan)
        return plan, config_left(built, plan), longest_context(built)

    def _check(self, plan: Plan) -> None:
        """Refuse a plan of another model by PlanError; by type alone without local safetensors."""
        from ..cutting.checkpoint import identity_of
        from ..cutting.checkpoint_files import is_checkpoint
        from ..models.identity import identify

        known = None
        if self.loaded is not None:
            known = identify(self.loaded)
        elif self.source is not None and is_checkpoint(self.source.path):
            known = identity_of(self.source.path, self.source.trust_remote_code)
        if known is not None:
            plan.check_model(known)
        plan.check_type(self.name, self.config.get_text_config(decoder=True).model_type)

    def load(self, dtype: Any) -> "PreTrainedModel":
        if self.loaded is not None:
            return self.loaded
        assert self.source is not None
        return replace(self.source, dtype=dtype).load()[0]


def _forecast(
    subject: _GainModel,
    plan: Plan,
    after: "PretrainedConfig",
    *,
    dtype: str,
    context: int,
    batch: int,
    devices: list[Device | None],
) -> Gain:
    """Count both models, and forecast their times."""
    from ..savings.account import count
    from ..savings.roofline import forecast
    from ..savings.timing import this_machine

    accounts = [
        count(config, dtype, context=context, batch=batch) for config in (subject.config, after)
    ]
    counts = plan.num_layers, len(plan.survivors)
    before, cut = (_sizes(*pair) for pair in zip(accounts, counts, strict=True))
    return Gain(
        subject.name,
        plan.num_layers,
        plan.dropped,
        dtype=dtype,
        context=context,
        batch=batch,
        before=before,
        after=cut,
        forecasts=tuple(
            forecast(device or this_machine(dtype), accounts, (before, cut), dtype=dtype)
            for device in devices
        ),
        versions=versions(),
        experts=plan.experts,
    )


def _measured(subject: _GainModel, found: Gain, plan: Plan) -> MeasuredGain:
    """Time the model with and without what goes in turns."""
    from ..cutting.in_model import without_layers
    from ..savings.timing import time_in_turns

    model = subject.load(found.dtype)
    cut = partial(without_layers, model, plan)
    return time_in_turns(model, cut, context=found.context, batch=found.batch)


def _sizes(account: "Account", num_layers: int) -> Sizes:
    def moved(operations: "Iterable[Operation]") -> int:
        return sum(one.read + one.written for one in operations)

    return Sizes(
        num_layers=num_layers,
        parameters=account.parameters,
        weight_bytes=account.weight_bytes,
        kv_bytes_per_token=account.cache_growth,
        kv_bytes=account.cache_bytes,
        prefill_flops=sum(one.flops for one in account.prefill),
        prefill_bytes=moved(account.prefill),
        decode_flops=sum(one.flops for one in account.decode),
        decode_bytes=moved(account.decode),
    )
