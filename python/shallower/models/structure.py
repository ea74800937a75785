"""What a model in memory computes by beside its weights, as values that can be hashed.

Its modules with their attributes, hooks and code. Code counts by its place in a package of known
version; where any other has a part, such as a hook of the user, nothing is known.
"""

import functools
import json
import re
import sys
from collections.abc import Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from tokenizers import AddedToken, Tokenizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..values.provenance import hash_of

_PACKAGES = {
    *("shallower", "torch", "transformers", "tokenizers", "accelerate", "bitsandbytes", "peft"),
    "kernels",
    *sys.stdlib_module_names,
}
"""Packages whose versions are in every key; what is defined elsewhere may be changed unseen."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device)
_KEPT_OF_CLASSES = (FunctionType, bool, int, float)
_OF_LAYERS = re.compile(
    r"torch\.nn\.modules\.(?!container).*|"
    r"transformers\.(activations|tokenization_\w+|models\..*(modeling|tokenization)_\w+)"
)
_WITHOUT_EFFECT = {
    *("name_or_path", "_name_or_path", "warnings_issued", "deprecation_warnings"),
    *("_parameters", "_buffers", "_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
}
"""Attributes that no forward reads, and tensors, which are hashed by their names."""


def structure_of(thing: Any) -> str | None:
    """Hash a model without its weights, or a tokenizer; None if code of the user is in it."""
    values = _Values()
    if any(vars(torch.nn.modules.module)[name] for name in _HOOKS_OF_ALL) or _modes():
        return None
    try:
        return hash_of([*map(values, (thing, *_ATTENTION)), values.code()])
    except (NotImplementedError, RecursionError):  # of a value, or code, that is not known
        return None


def _modes() -> bool:
    """Whether code of the user takes part in all functions or operators of torch."""
    return bool(_get_current_function_mode_stack() or _get_current_dispatch_mode_stack())


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class of known packages, which says how it is computed with."""
    return type(tensor).__module__.partition(".")[0] in _PACKAGES


_HOOKS_OF_ALL = ("_global_forward_hooks", "_global_forward_pre_hooks")


_ATTENTION = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)


class _Values:
    """Values as JSON; a repeated one is its number, and code is noted by its module."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[int, Any]] = {}  # with the value, whose id stays its own
        self._modules: dict[str, None] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, _PLAIN) and not isinstance(value, Enum):
            return repr(value)
        if id(value) not in self._met:
            self._met[id(value)] = len(self._met), value
            return self._first(value)
        return self._met[id(value)][0]

    def _first(self, value: Any) -> Any:
        match value:
            case AlignDevicesHook():  # it brings weights, which are hashed by their names
                return [self(type(value)), self(value.execution_device)]
            case Mapping():
                return [self(type(value)), [[self(key), self(value[key])] for key in value]]
            case list() | tuple():
                return [self(type(value)), [*map(self, value)]]
            case set() | frozenset():
                return ["set", sorted(map(repr, map(self, value)))]
            case Tokenizer():
                rules = json.loads(value.to_str())  # every call sets these two
                return {**rules, "truncation": None, "padding": None}
            case Enum() | AddedToken():
                return [self(type(value)), repr(value)]
            case torch.Tensor():
                plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                return [str(value.dtype), [*value.shape], hash_of(plain.tolist())]
            case functools.partial():
                return [*map(self, (value.func, value.args, value.keywords))]
            case MethodType():
                return [self(value.__func__), self(value.__self__)]
            case FunctionType():
                return self._function(value)
            case type() if "<locals>" in value.__qualname__:  # such as kernels' of a function
                _check(str(value.__module__))
                return [value.__qualname__, [*map(self, value.__bases__)], self._members(value)]
            case type() | BuiltinFunctionType() | ModuleType():
                return self._named(value)
        if not hasattr(value, "__dict__"):
            raise NotImplementedError(value)
        kept = {name: one for name, one in vars(value).items() if name not in _WITHOUT_EFFECT}
        return [self(type(value)), self(kept)]

    def _function(self, value: FunctionType) -> Any:
        """Where it is defined, and all that it was made with."""
        code, home = value.__code__, str(value.__globals__.get("__name__"))
        _check(home)
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        made_with = [value.__defaults__, value.__kwdefaults__, held]
        return [home, code.co_qualname, code.co_firstlineno, *map(self, made_with)]

    def _named(self, value: Any) -> str:
        """The name of what is found by it."""
        if isinstance(value, ModuleType):
            return value.__name__
        home, path = str(value.__module__), value.__qualname__
        _check(home)
        if isinstance(value, type):
            self._modules |= dict.fromkeys(one.__module__ for one in value.__mro__)
            at = functools.reduce(
                lambda at, name: getattr(at, name, None), path.split("."), sys.modules.get(home)
            )
            if at is not value:
                raise NotImplementedError(value)
        return f"{home}.{path}"

    def code(self) -> Any:
        """The functions and methods that define layers and tokenizers, as they are now."""
        found = []
        for home in ["torch.nn.functional", *filter(_OF_LAYERS.fullmatch, self._modules)]:
            for name, one in vars(sys.modules[home]).items():
                if "tokenization" in home and not _is_tokenizer(one):
                    continue
                if isinstance(one, FunctionType | torch.nn.Module):
                    found.append([home, name, self(one)])
                elif isinstance(one, type) and one.__module__ == home:
                    found.append([home, name, self._members(one)])
        return found

    def _members(self, value: type) -> Any:
        """The functions and numbers of a class, by their names."""
        parts = {key: getattr(of, "__func__", of) for key, of in vars(value).items()}
        kept = [key for key in parts if isinstance(parts[key], _KEPT_OF_CLASSES)]
        return [[key, self(parts[key])] for key in kept]


def _is_tokenizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, PreTrainedTokenizerBase)


def _check(home: str) -> None:
    if home.partition(".")[0] not in _PACKAGES:
        raise NotImplementedError(home)
