"""The check of a lossless cut: its hidden states are those of the whole model, to the bit."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from ..errors import ModelError
from ..models.architecture import admitted_length
from ..models.decoder import Decoder
from ..models.loading import loader_with_head
from .saving import loader_like

SHORT, LONG = 9, 64
"""Tokens of the sequences that are compared, where no sliding window needs more."""

MOST_WINDOW = 1024
"""The longest sliding window that a sequence goes beyond."""


def kind_of(config: Any) -> Any:
    """The stock loader of a checkpoint, which may be stored without its head."""
    named = getattr(config, "architectures", None) or [""]
    return AutoModel if named[0] in MODEL_MAPPING_NAMES.values() else loader_with_head(config)


class StatesCheck:
    """The states of a whole model on a few sequences, to compare those of a cut; it is not kept."""

    def __init__(self, model: PreTrainedModel, states: tuple[int, ...]) -> None:
        self._states, self._tokens = states, list(_sequences(Decoder.of(model)))
        self._load = loader_like(model, kind_of(model.config))
        self._expected = self._read(model)

    def compare(self, path: Path, out: Path) -> None:
        """Load a cut from ``path``, to lie at ``out``; ModelError if a bit of a state differs."""
        with TemporaryDirectory() as folder:
            named = Path(folder) / "cut.gguf"
            if path.is_file():
                named.symlink_to(path.absolute())
            found = self._read(self._load(named if path.is_file() else path))
        for (state, want), (_, got) in zip(self._expected, found, strict=True):
            if not torch.equal(want.view(torch.uint8), got.view(torch.uint8)):  # NaN too
                off = float((want.double() - got.double()).abs().max())
                raise ModelError(
                    f"the cut {out} is not lossless, and is not kept: after a stock reload its "
                    f"state {state} is off by up to {off:.2g}"
                )

    def _read(self, model: PreTrainedModel) -> list[tuple[int, torch.Tensor]]:
        """The states of every batch by their numbers, each (B, T, width), on the CPU."""
        decoder, run = Decoder.of(model), cast("Any", model)
        read: list[tuple[int, torch.Tensor]] = []
        for ids, mask in self._tokens:
            with torch.no_grad():  # weights that travel cannot move in inference mode
                found = run(
                    input_ids=ids.to(decoder.device),
                    attention_mask=mask.to(decoder.device),
                    use_cache=False,
                    output_hidden_states=True,
                ).hidden_states
            if found is None or len(found) != len(decoder) + 1:
                raise ModelError(
                    f"{type(model).__name__} gives {len(found or ())} hidden states for "
                    f"{len(decoder)} layers, expected {len(decoder) + 1}: name the layers to drop "
                    f"yourself",
                    see="families",
                )
            read += [(state, found[state].cpu().contiguous()) for state in self._states]
        return read


def _sequences(decoder: Decoder) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and attention masks, (B, T) int64: one text, then two of which one is padded.

    Ids are of the middle of the vocabulary, away from those that stand for images.
    """
    config = decoder.config
    window = getattr(config, "sliding_window", None)
    window = window if isinstance(window, int) and window <= MOST_WINDOW else 0
    longest = max(LONG, window + SHORT)
    longest = min(longest, admitted_length(config) or longest)
    generator = torch.Generator().manual_seed(0)
    for batch, length in ((1, min(SHORT, longest)), (2, longest)):
        middle = config.vocab_size // 4, config.vocab_size // 2
        ids = torch.randint(*middle, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, length // 2 :] = 0
        yield ids, mask
