"""A stage of fake devices: torch's own rules of which tensors may meet, without a GPU.

Under torch's FakeTensorMode a tensor knows its shape, dtype and device, and holds no values. What
that mode lets pass though CUDA would not (an index on another card, a generator of another
device), the stage refuses as well, and token ids and masks that are not where the model begins.
Where a value is read, it gives an answer, so that code that reads a loss or a norm goes on: True,
1, or a little less than at any read before, as of a loss that falls.
"""

import copy
import functools
import itertools
import json
import os
import sys
import tempfile
import warnings
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path

import accelerate.hooks
import accelerate.utils.offload
import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from shallower.models import prefetch
from tests.devices.timeline import Timeline, arguments, is_on_card

aten = torch.ops.aten

WIDTH, INNER_WIDTH = 1024, 2752
"""Of states, and within the feed-forward part: in the panels of least squares that is several."""


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
        self.timeline = Timeline()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return args[0].device
        kwargs = kwargs or {}
        if function.overloadpacket in (aten._local_scalar_dense, aten.item, aten.is_nonzero):
            if is_on_card(args[0]):
                self.timeline.wait_for(args[0].device)
            self.timeline.host_reads(args[0])
            return self._value(args[0].dtype)
        output = self._call(function, args, kwargs)
        self.timeline.saw(function, args, kwargs, output)
        return self.timeline.pin(output) if kwargs.get("pin_memory") else output

    def _call(self, function, args, kwargs):
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
            return (
                args[0]
                if _stays(function, *args, **kwargs)
                else function.decompose(*args, **kwargs)
            )
        if function is aten.scaled_dot_product_attention.default:  # whole, in inference mode
            _require_one_device(function, tree_leaves((args, kwargs)))
            return torch.empty_like(args[0])
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


def _stays(function, tensor, *to, **options):
    """Whether ``Tensor.to`` has nothing to do, as of most that hooks of accelerate are given."""
    wanted = dict(zip(arguments(function)[0][1:], to, strict=False)) | options
    asked = {
        name: value for name, value in wanted.items() if value is not None and value is not False
    }
    is_so = {"device": tensor.device, "dtype": tensor.dtype, "layout": tensor.layout}
    return all(name == "non_blocking" or is_so.get(name) == value for name, value in asked.items())


def _require_one_device(function, values):
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len(devices := {tensor.device for tensor in tensors}) > 1:
        raise DeviceError(f"{function}: tensors on the devices {sorted(map(str, devices))}")


class _AtOnce(Executor):
    """Stands for a thread, in which tensors would not be fake: work is done when it is given."""

    def __init__(self, *_args, **_options):
        pass

    def submit(self, work, /, *args, **kwargs):
        done = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


class _Opened:
    """Stands for an open file of safetensors, whose tensors have no values."""

    def __init__(self, path, **_options):
        with Path(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self.header = json.loads(file.read(size))

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def get_tensor(self, name):
        return torch.empty(self.header[name]["shape"], dtype=torch.bfloat16)


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


def _pinning(timeline):
    def pinned(tensor, _device=None):
        """Stands for pinned memory, into which the CPU's tensors alone are copied."""
        if tensor.device.type != "cpu":
            raise DeviceError(f"a tensor on device {tensor.device} cannot be pinned")
        return timeline.pin(tensor.clone())

    return pinned


def _numpy(plain, timeline):
    @functools.wraps(plain)
    def numpy(self, *, force=False):
        if not isinstance(self, FakeTensor):
            return plain(self, force=force)
        if self.device.type != "cpu":
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        timeline.host_reads(self)
        kind = torch.empty(0, dtype=self.dtype, device="meta")
        return np.zeros(self.shape, str(kind.dtype).removeprefix("torch."))

    return numpy


class Stage:
    """So many fake CUDA devices; the context in which everything is fake.

    Args:
        devices: one or two; none is the CPU, on which backward can be rehearsed, too.
        offloading: whether the layer before the middle waits in the CPU's memory.
        streaming: whether all layers are streamed from disk, in a file that has no blocks there.
    """

    def __init__(self, devices=1, *, offloading=False, streaming=False):
        self.devices, self.offloading, self.streaming = devices, offloading, streaming
        self.first = torch.device("cuda:0" if devices else "cpu")
        self.last = torch.device("cuda", devices - 1) if devices else self.first
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.answers = _Answers()

    @contextmanager
    def open(self, **by_reader):
        """Everything is fake in the body; functions named in ``by_reader`` read those values."""
        self.answers.by_reader = {name: itertools.cycle(v) for name, v in by_reader.items()}
        self.answers.timeline = self.timeline = Timeline()
        with _standing_in(self.timeline), self.mode, self.answers:
            yield self
        if self.timeline.early:
            raise DeviceError(f"a device gets back {self.timeline.early[0]}")

    @functools.cache  # noqa: B019 - as long as the stage
    def model(self, layers=4):
        """A narrow Llama-2, without values, in bfloat16, on the devices."""
        return self.llama(layers)

    def llama(self, layers=4, **options):
        """The same, anew: for who changes it."""
        shapes = {
            "hidden_size": WIDTH,
            "intermediate_size": INNER_WIDTH,
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
        apart = self.devices == 2 or self.offloading or self.streaming
        return self.spread(model) if apart else model

    def mixture(self, config):
        """A mixture by its config, without values, in bfloat16, on the devices."""
        config = copy.deepcopy(config)
        config._experts_implementation = "batched_mm"  # without loops over what is chosen
        with self.mode, self.first:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        apart = self.devices == 2 or self.offloading or self.streaming
        return self.spread(model) if apart else model

    def spread(self, model):
        """Half of the layers on the last device, one offloaded, or all on disk, by accelerate."""
        layers = [f"model.layers.{index}" for index in range(len(model.model.layers))]
        places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), 0)
        for index, layer in enumerate(layers):
            on_last = index >= len(layers) // 2
            places[layer] = "disk" if self.streaming else self.last.index if on_last else 0
        if self.offloading:
            places[layers[len(layers) // 2 - 1]] = "cpu"
        places |= dict.fromkeys(("model.norm", "lm_head"), self.last.index)
        options = {"skip_keys": model._skip_keys_device_placement}
        if self.streaming:
            self.folder = tempfile.TemporaryDirectory(prefix="stage-")
            options["offload_index"] = _stored(model.model.layers, Path(self.folder.name))
        with self.mode, _standing_in(Timeline()):
            return dispatch_model(model, places, **options)


def _stored(layers, folder):
    """Where the weights of layers would lie, in a file of safetensors that has only room."""
    path, end, header = folder / "layers.safetensors", 0, {}
    for name, weight in layers.named_parameters(prefix="model.layers"):
        begin, end = end, end + 2 * weight.numel()
        places = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
        header[name] = places
    written = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    return {name: {"safetensors_file": str(path), "weight_name": name} for name in header}


@contextmanager
def _standing_in(timeline):
    """What fake tensors and fake devices cannot do, done otherwise in the body."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        patch.setattr(accelerate.hooks, "set_module_tensor_to_device", _set)
        patch.setattr(nn.Module, "_apply", _apply)
        patch.delattr(os, "posix_fadvise", raising=False)  # no file has anything to fetch
        patch.setattr(accelerate.utils.offload, "safe_open", _Opened)
        patch.setattr(prefetch, "ThreadPoolExecutor", _AtOnce)
        patch.setattr(torch.Tensor, "numpy", _numpy(torch.Tensor.numpy, timeline))
        patch.setattr(torch.Tensor, "pin_memory", _pinning(timeline))
        patch.setattr(torch.autograd, "grad", _grad(torch.autograd.grad))
        for name, value in (("Event", timeline.Event), ("Stream", timeline.Stream)):
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda, "stream", timeline.within)
        patch.setattr(torch.cuda, "current_stream", timeline.current_stream)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        yield


def devices_of(values):
    """The devices of all tensors in a structure, as text."""
    return {str(leaf.device) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
