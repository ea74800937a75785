"""A stage of fake devices: torch's own rules of which tensors may meet, without a GPU.

Under torch's FakeTensorMode a tensor knows its shape, dtype and device, and holds no values. What
that mode lets pass though CUDA would not (an index on another card, a generator of another
device), the stage refuses as well, and token ids and masks that are not where the model begins.
Where a value is read, it gives an answer, so that code that reads a loss or a norm goes on: True,
1, or a little less than at any read before, as of a loss that falls.
"""

import functools
import itertools
import sys
import warnings
from contextlib import contextmanager

import accelerate.hooks
import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

aten = torch.ops.aten


class DeviceError(RuntimeError):
    """What CUDA would refuse, and torch's fake tensors let pass."""


def is_about_devices(error):
    """Whether an error says that tensors of different devices met."""
    return "device" in str(error) or "CPU first" in str(error)


class _Answers(TorchDispatchMode):
    """Gives values where they are read, and refuses what only fake tensors allow."""

    def __init__(self):
        super().__init__()
        self.by_reader = {}
        self.falling = 1.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket in (aten._local_scalar_dense, aten.item, aten.is_nonzero):
            return self._value(args[0].dtype)
        if function in (aten.equal.default, aten.allclose.default):
            aten.eq.Tensor(*args[:2])  # which refuses two devices
            return True
        if function is aten.from_file.default:
            return torch.empty(kwargs.get("size", args[-1]), dtype=kwargs.get("dtype"))
        if function in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            args = self._index(*args)
        if function in (aten.cat.default, aten.stack.default):
            _require_one_device(function, args[0])
        if function.overloadpacket is aten.to:  # in inference mode; fake tensors know what it is of
            return function.decompose(*args, **kwargs)
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if generator is not None and device is not None and generator.device != device:
            raise DeviceError(f"{function}: a generator of {generator.device} on device {device}")
        return function(*args, **kwargs)

    def _value(self, dtype):
        frame, name = sys._getframe(2), ""
        while frame is not None and not name:
            if "/shallower/" in frame.f_code.co_filename:
                name = frame.f_code.co_name
            frame = frame.f_back
        if name in self.by_reader:
            return next(self.by_reader[name])
        self.falling *= 0.999
        return self.falling if dtype.is_floating_point else dtype == torch.bool or 1

    def _index(self, tensor, indices, *rest):
        """Indices that may meet the tensor; a mask picks everything, as its values are unknown."""
        found = []
        for index in indices:
            if index is not None and index.device not in (tensor.device, torch.device("cpu")):
                raise DeviceError(f"index on device {index.device} of a tensor on {tensor.device}")
            if index is not None and index.dtype == torch.bool:
                rows = torch.empty(index.numel(), dtype=torch.long, device=index.device)
                found += [rows] * index.ndim
            else:
                found.append(index)
        return tensor, found, *rest


def _require_inputs(module, args, kwargs):
    """Inputs where the model begins: only some families move a mask by themselves."""
    where = next(module.parameters()).device
    for given in tree_leaves((args, kwargs)):
        if isinstance(given, torch.Tensor) and given.device != where:
            raise DeviceError(f"an input on device {given.device} of a model on {where}")


def _require_one_device(function, tensors):
    if len(devices := {tensor.device for tensor in tensors}) > 1:
        raise DeviceError(f"{function}: tensors on the devices {sorted(map(str, devices))}")


class Event:
    """Stands for an event of CUDA, which needs a card."""

    def __init__(self, *_args, **_options):
        self.recorded = self.awaited = False

    def record(self, stream=None):
        self.recorded = True

    def wait(self, stream=None):
        self.awaited = True

    def query(self):
        return True

    def synchronize(self):
        assert self.recorded
        self.awaited = True


class Stream(Event):
    """Stands for a stream of CUDA, on which nothing has to wait."""

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        assert event.recorded

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event


@contextmanager
def _stream(_stream):
    yield


def _apply(module, change, recurse=True):
    """Stands for what is behind ``Module.to``: fake parameters cannot be swapped in their place."""
    for part in module.modules() if recurse else [module]:
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                part._parameters[name] = nn.Parameter(change(weight.detach()), weight.requires_grad)
        for name, buffer in list(part._buffers.items()):
            part._buffers[name] = buffer if buffer is None else change(buffer)
    return module


def _set(module, name, device, value=None, **_tied):
    """Stands for accelerate's move of a weight, which cannot make fake parameters anew."""
    path, _, name = name.rpartition(".")
    module = module.get_submodule(path)
    own = module._parameters if name in module._parameters else module._buffers
    if own[name].device != torch.device(device) or value is not None:
        moved = (own[name].detach() if value is None else value.detach()).to(device)
        own[name] = nn.Parameter(moved, False) if own is module._parameters else moved


def _grad(plain):
    """Stands for a backward that is asked for, which torch's engine runs on real devices alone."""

    @functools.wraps(plain)
    def grad(output, given, errors, **options):
        if output.device.type == "cpu":
            return plain(output, given, errors, **options)
        wanted = [given] if isinstance(given, torch.Tensor) else given
        assert output.requires_grad
        assert all(one.requires_grad for one in wanted)
        torch.empty_like(output) + errors
        return tuple(torch.empty_like(one) for one in wanted)

    return grad


def _pinned(tensor, _device=None):
    """Stands for pinned memory, into which the CPU's tensors alone are copied."""
    if tensor.device.type != "cpu":
        raise DeviceError(f"a tensor on device {tensor.device} cannot be pinned")
    return tensor


def _numpy(plain):
    @functools.wraps(plain)
    def numpy(self, *, force=False):
        if not isinstance(self, FakeTensor):
            return plain(self, force=force)
        if self.device.type != "cpu":
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        kind = torch.empty(0, dtype=self.dtype, device="meta")
        return np.zeros(self.shape, str(kind.dtype).removeprefix("torch."))

    return numpy


class Stage:
    """So many fake CUDA devices; the context in which everything is fake.

    Args:
        devices: one or two; none is the CPU, on which backward can be rehearsed, too.
        offloading: whether half of the layers wait in the CPU's memory.
    """

    def __init__(self, devices=1, *, offloading=False):
        self.devices, self.offloading = devices, offloading
        self.first = torch.device("cuda:0" if devices else "cpu")
        self.last = torch.device("cuda", devices - 1) if devices else self.first
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.answers = _Answers()

    @contextmanager
    def open(self, **by_reader):
        """Everything is fake in the body; functions named in ``by_reader`` read those values."""
        self.answers.by_reader = {name: itertools.cycle(v) for name, v in by_reader.items()}
        with _standing_in(), self.mode, self.answers:
            yield self

    @functools.cache  # noqa: B019 - as long as the stage
    def model(self, layers=4):
        """A Llama in the shapes of Llama-2-7B, without values, in bfloat16, on the devices."""
        return self.llama(layers)

    def llama(self, layers=4, **options):
        """The same, anew: for who changes it."""
        shapes = {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
        }
        config = LlamaConfig(**shapes | {"num_hidden_layers": layers} | options)
        with self.mode, self.first:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for part in (model, model.model):
            part.register_forward_pre_hook(_require_inputs, with_kwargs=True)
        return self.spread(model) if self.devices == 2 or self.offloading else model

    def spread(self, model):
        """The second half of the layers on the second device, or offloaded, by accelerate."""
        half, other = len(model.model.layers) // 2, "cpu" if self.offloading else 1
        places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), 0)
        for index in range(len(model.model.layers)):
            places[f"model.layers.{index}"] = 0 if index < half else other
        places |= dict.fromkeys(("model.norm", "lm_head"), self.last.index)
        with self.mode, _standing_in():
            return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


@contextmanager
def _standing_in():
    """What fake tensors and fake devices cannot do, done otherwise in the body."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        patch.setattr(accelerate.hooks, "set_module_tensor_to_device", _set)
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(torch.Tensor, "numpy", _numpy(torch.Tensor.numpy))
        patch.setattr(torch.Tensor, "pin_memory", _pinned)
        patch.setattr(torch.autograd, "grad", _grad(torch.autograd.grad))
        for name, value in (("Event", Event), ("Stream", Stream), ("stream", _stream)):
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        yield


def devices_of(values):
    """The devices of all tensors in a structure, as text."""
    return {str(leaf.device) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
