"""The models that a healing loads: the cut that it trains, and the original."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..memory.device import free_memory
from ..models.identity import identify
from ..models.quantised import keep_unpacked
from ..models.source import ModelSource
from ..values.plan import Plan
from .ranks import own_device_map


def load_placed(
    path: str, dtype: Any, *, trust_remote_code: bool, progress: bool | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer on the device of this process, ready for training."""
    model, tokenizer = placed(path, dtype, trust_remote_code).load(progress)
    keep_unpacked(model)
    return model, tokenizer


def placed(path: str, dtype: Any, trust_remote_code: bool) -> ModelSource:
    """The source of a model on the device of this process; raises as :func:`load_placed`."""
    device_map: Any = own_device_map()
    return ModelSource(path, dtype, device_map, trust_remote_code=trust_remote_code)


class LoadedOnce:
    """A model that is loaded when it is first needed, and again once it was released."""

    def __init__(self, name: str, *, trust_remote_code: bool, progress: bool | None = None) -> None:
        self.name, self._progress = name, progress
        self._trust_remote_code = trust_remote_code
        self._dtype: str | None = None
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def load(self, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model and its tokenizer once in a dtype; PlanError if it is not the plan's."""
        if self._loaded is None or not self.is_loaded(dtype):
            self.release()
            loaded = load_placed(
                self.name,
                dtype,
                trust_remote_code=self._trust_remote_code,
                progress=self._progress,
            )
            self._check(loaded[0])
            self._loaded, self._dtype = loaded, dtype
        return self._loaded

    def is_loaded(self, dtype: str) -> bool:
        """Say whether the model is in memory in this dtype."""
        return self._loaded is not None and self._dtype == dtype

    def _check(self, model: PreTrainedModel) -> None:
        """Refuse a model that is not the one meant."""

    def release(self) -> None:
        """Let go of the model, and of its memory once nothing else holds it."""
        if self._loaded is not None:
            self._loaded = self._dtype = None
            free_memory()


class OriginalModel(LoadedOnce):
    """The uncut model of a healing, which must be the one that the plan was made for."""

    def __init__(
        self, name: str, plan: Plan, *, trust_remote_code: bool, progress: bool | None = None
    ) -> None:
        super().__init__(name, trust_remote_code=trust_remote_code, progress=progress)
        self._plan = plan

    def _check(self, model: PreTrainedModel) -> None:
        self._plan.check_model(identify(model))
