"""A model in memory as a standard checkpoint, and the check that it is the cut it should be."""

import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast, get_args

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..errors import ModelError, OutputError, PlanError, why
from ..memory.weights import module_bytes
from ..models.architecture import admitted_length, find_layers, require_weights, undo_rescaling
from ..models.decoder import Decoder
from ..models.dtypes import QUANTISED, STREAM, Dtype
from ..models.identity import stored_dtype
from ..models.loading import load_model, load_weights, loader_with_head
from ..models.quantised import check_exact, clear_gguf_marks
from ..models.source import place_of
from ..models.unsaved import warn_unsaved
from ..progress import track
from ..results.loss import Loss
from ..storage import check_apart, new_folder
from ..texts.quiet import hushed
from ..values.files import PLAN_FILE
from ..values.layers import Layers
from ..values.plan import Plan, check_plan
from .cards import exports
from .checkpoint import PreparedCut
from .exports import CutFacts
from .gguf import prepare_gguf, read_metadata
from .in_model import without_layers
from .laid_over import cut_as_stored, require_whole, write_as_stored
from .source import UncutModel, find_source

PROBE = "The quick brown fox jumps over the lazy dog, and then it does so again."
"""The text on which a cut is compared with its source where no other is named."""

PIECE = 100 << 20
"""Bytes of a file of weights at most, where layers are streamed from disk and none is larger."""


SHORT, LONG = 9, 64
"""Tokens of the sequences that are compared, where no sliding window needs more."""

MOST_WINDOW = 1024
"""The longest sliding window that a sequence goes beyond."""


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    *,
    plan: Plan | None = None,
    overwrite: bool = False,
    losses: tuple[Loss, Loss] | None = None,
    text_only: bool = False,
) -> None:
    """Save a standard checkpoint, whole or not at all, that stock transformers loads.

    With a plan, a model from a folder of plain safetensors is saved as its source is stored. The
    source is cut on disk, and the changed weights are laid over it, in its dtypes. Towers and heads
    that transformers did not load stay.

    With a plan, the folder also holds the plan, a model card, the source's license, and the same
    cut for mergekit and llama.cpp (``exports.EXPORT_FILES``).

    Args:
        model: cut or not; a 4-bit model becomes a standard 4-bit checkpoint.
        tokenizer: saved beside it, unless ``None``.
        path: a folder that does not exist yet, or is empty.
        plan: what was dropped; saved as ``shallower_plan.json``.
        overwrite: replace an earlier output at ``path``, once the new checkpoint is complete.
        losses: the held-out loss before and after the cut, for the model card.
        text_only: save what transformers has loaded alone, in the model's dtype.

    Raises:
        PlanError: ``plan`` is none, or leaves another number of layers than the model has.
        OutputError: ``path`` holds something already, or cannot be written to.
        ModelError: weights that cannot be saved as they are; tensors of the source that
            transformers did not load, where no cut can be laid over it, without ``text_only``.

    Example:
        >>> plan = sh.drop_layers(model, scan.plan(8))
        >>> sh.save_model(model, tokenizer, "cut", plan=plan)
    """
    if plan is None:
        with _new_folder(model, Path(path), overwrite) as folder:
            if text_only:
                require_whole(model, text_only)
            else:
                warn_unsaved(model)
            _save_loaded(model, tokenizer, folder, Path(path))
    else:
        how: Any = {"overwrite": overwrite, "losses": losses, "text_only": text_only}
        save_cut(model, tokenizer, path, plan=plan, **how)


def save_cut(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    *,
    plan: Plan,
    source: UncutModel | None = None,
    as_loaded: bool = False,
    text_only: bool = False,
    gguf: Path | None = None,
    overwrite: bool = False,
    losses: tuple[Loss, ...] | None = None,
    tested: str = "",
    command: str = "",
    beside: Callable[[Path], Mapping[str, bytes] | None] = lambda _: None,
) -> None:
    """Save a cut as :func:`save_model` does; ``source`` is what the model names by default.

    ``as_loaded``: in the model's dtype, as transformers saves it; with ``text_only`` so too, and on
    purpose without what it did not load. With ``gguf`` the folder gets a GGUF file that is cut from
    that one, in its types. ``tested`` and ``command`` are as in :class:`~.exports.CutFacts`;
    ``beside`` gets the complete folder, and may give more files, by name.
    """
    check_plan(plan)
    if gguf is not None:
        cut = prepare_gguf(gguf, plan, path, losses=losses, tested=tested, command=command)
        cut.write(overwrite=overwrite, progress=False)
        return
    require_weights(model)
    if text_only:
        require_whole(model, text_only)
    left = len(find_layers(model))
    if len(plan.survivors) != left:
        raise PlanError(
            f"the plan leaves {len(plan.survivors)} layers, and the model has {left}: save the "
            f"model that the plan was carried out on"
        )
    loaded = as_loaded or text_only
    stored = None if loaded else cut_as_stored(model, plan, _has_own_code(model))
    source = source or (stored.facts.source if stored else _source_of(model, plan))
    facts = replace(
        _facts(model, plan, source, text_only), losses=losses, command=command, tested=tested
    )
    if stored:
        stored = replace(stored, facts=_facts_as_stored(facts, stored.facts))
    with _new_folder(model, Path(path), overwrite, stored) as folder:
        if stored is None or not write_as_stored(stored, model, folder):
            if not text_only:
                (warn_unsaved if as_loaded else require_whole)(model)
            _save_loaded(model, tokenizer, folder, Path(path))
            _save_facts(facts, folder)
        elif tokenizer is not None and tokenizer.name_or_path != model.name_or_path:
            tokenizer.save_pretrained(folder)
        for name, content in (beside(folder) or {}).items():
            (folder / name).write_bytes(content)


@contextmanager
def _new_folder(
    model: PreTrainedModel, path: Path, overwrite: bool, stored: PreparedCut | None = None
) -> Iterator[Path]:
    """Give the folder that a checkpoint is written to, which takes its place once it is whole."""
    check_apart(path, [place_of(model)])
    check_exact(model)
    require_weights(model)
    undo_rescaling(model)
    size = module_bytes(model) if stored is None else stored.num_bytes
    with new_folder(path, overwrite, size) as folder:
        yield folder


def _save_loaded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, path: Path
) -> None:
    """Let transformers write what it has loaded of a checkpoint; ``path`` is named in errors."""
    if str(getattr(model, "quantization_method", "")).endswith(("GGUF", "gguf")):
        clear_gguf_marks(model)
    dtype = model.config.dtype
    try:
        with hushed(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded")
            model.save_pretrained(folder, **_in_pieces(model))
        model.config.dtype = dtype  # which save_pretrained turns into a word
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {why(error, path)}") from error
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"transformers cannot save {type(model).__name__}: {why(error)}"
        ) from error


def _save_facts(facts: CutFacts, folder: Path) -> None:
    """Write the plan and the card of a cut, and what its source has of licenses and modules."""
    facts.plan.save(folder / PLAN_FILE)
    for name, file in {**facts.source.licenses, **facts.source.modules}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    for name, text in exports(facts).items():
        (folder / name).write_text(text, encoding="utf-8")


def _in_pieces(model: PreTrainedModel) -> dict[str, Any]:
    """How transformers divides a streamed model's weights, so that one file's fit in memory."""
    if not Decoder.of(model).is_streamed:
        return {}
    return {"max_shard_size": max(PIECE, *map(module_bytes, find_layers(model).modules))}


def _source_of(model: PreTrainedModel, plan: Plan) -> UncutModel:
    """The source that a model in memory names."""
    named, of_config = str(model.name_or_path), str(model.config.name_or_path)
    if not of_config.endswith(".gguf"):
        name = plan.model.name if plan.model else type(model).__name__
        return find_source(named or name)
    if named.endswith(".gguf"):  # its folder is not known any more
        return UncutModel(of_config, gguf=of_config)
    metadata = read_metadata(Path(named).expanduser() / of_config)
    return find_source(named, gguf_file=of_config, metadata=metadata)


def _facts(model: PreTrainedModel, plan: Plan, source: UncutModel, text_only: bool) -> CutFacts:
    """The facts of a cut whose weights are saved as they are in memory."""
    dtype = stored_dtype(model)
    quantised = getattr(model.config, "quantization_config", None) is not None
    plain = dtype if dtype in QUANTISED or not quantised else None
    return CutFacts(
        plan,
        source,
        options={
            "dtype": plain if plain in get_args(Dtype) else None,
            "trust_remote_code": _has_own_code(model),
            "text_only": text_only,
        },
        dtype=dtype,
        needs_5=True,
        loader=loader_with_head(model.config).__name__,
    )


def _facts_as_stored(facts: CutFacts, of: CutFacts) -> CutFacts:
    """The facts of a cut that is saved as its source is stored, by those of the cut on disk.

    A command that loads the model keeps its options.
    """
    plan, options = facts.plan, facts.options if facts.command else of.options
    if plan.model:
        plan = replace(plan, model=replace(plan.model, dtype=of.dtype or "unknown"))
    return replace(facts, plan=plan, options=options, dtype=of.dtype, needs_5=of.needs_5)


def _has_own_code(model: PreTrainedModel) -> bool:
    """Whether the model's own code runs it, which the user has allowed then."""
    return type(model).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)


def logits_difference(
    model: PreTrainedModel,
    path: str | Path,
    layers: Plan | Layers | None,
    *,
    input_ids: torch.Tensor,
) -> float:
    """The greatest difference in logits of a saved checkpoint and the model without the layers.

    ``input_ids`` are (B, T) int64; ``layers`` is None if the model is without them already. Stock
    transformers loads the checkpoint, and both run on the device of the model, so that they round
    alike. A GPU needs no room for a second model: the layers of the checkpoint visit it one after
    the other, or are streamed where those of the model are.
    """
    device = Decoder.of(model).device
    input_ids = input_ids.to(device)
    skipped = nullcontext() if layers is None else without_layers(model, layers)
    with torch.inference_mode(), skipped:
        expected = model(input_ids=input_ids, use_cache=False).logits
    reloaded: Any = loader_like(model)(path)
    with torch.no_grad():  # weights cannot move in inference mode
        got = reloaded(input_ids=input_ids, use_cache=False).logits
    expected = expected.to(device)  # that of a model on several GPUs may be on the last one
    return float((got.float() - expected.float()).abs().max())


def loader_like(
    model: PreTrainedModel, kind: Any = None
) -> Callable[[str | Path], PreTrainedModel]:
    """Give what loads a checkpoint so that it rounds as a model does, which may be gone by then."""
    decoder = Decoder.of(model)
    device, streamed, plain = decoder.device, decoder.is_streamed, model.dtype
    dtype, trusted = cast("Dtype", stored_dtype(model)), _has_own_code(model)

    def load(path: str | Path) -> PreTrainedModel:
        if streamed:
            return load_model(path, dtype, STREAM, trust_remote_code=trusted, progress=False)[0]
        if Path(path).suffix == ".gguf":
            loaded, _ = load_model(path, dtype, "cpu", progress=False)
        else:
            loaded = load_weights(
                str(path),
                plain,
                None if device.type == "cpu" else "cpu",
                options={"trust_remote_code": True} if trusted else None,
                kind=kind,
            )
        lend_layers(loaded, device)
        return loaded

    return load


def lend_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Make a model on the CPU run on another device: a layer is there while it runs."""
    if device.type == "cpu":
        return
    layers = find_layers(model)
    modules = layers.modules
    setattr(layers.owner, layers.name, nn.ModuleList())
    cast("Any", model).to(device)
    setattr(layers.owner, layers.name, modules)

    def come(layer: nn.Module, _args: Any) -> None:
        layer.to(device)

    def leave(layer: nn.Module, _args: Any, _output: Any) -> None:
        layer.to("cpu")

    for layer in modules:
        layer.register_forward_pre_hook(come)
        layer.register_forward_hook(leave)


def verify_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    layers: Plan | Layers | None,
    text: str = PROBE,
) -> float:
    """Check a saved cut against the model with its layers skipped, on one text.

    Args:
        model: the uncut model; it is as before afterwards.
        tokenizer: its tokenizer.
        path: the checkpoint, a folder or a GGUF file.
        layers: that were dropped: a plan, or blocks, ranges or indices; None if the model is
            without them already.
        text: of which the first 128 tokens are compared.

    Returns:
        The greatest absolute difference of the logits.

    Raises:
        ModelError: it exceeds 1e-5 in float32, or 0.1 in the other dtypes; or a GPU has not the
            memory that the comparison takes.
    """
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :128]
    try:
        difference = logits_difference(model, path, layers, input_ids=input_ids)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the checkpoint {path} is not verified: beside the model there is not enough memory "
            f"for its embedding, its head and one layer; verify it with the model on the CPU "
            f"(device_map, --device-map cpu)"
        ) from error
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.1
    if not difference <= tolerance:
        raise ModelError(
            f"the checkpoint {path} is not the model with its layers skipped: its logits are off "
            f"by {difference:.2g}, more than {tolerance:.0e}"
        )
    return difference


def kind_of(config: Any) -> Any:
    """The stock loader of a checkpoint, which may be stored without its head."""
    named = getattr(config, "architectures", None) or [""]
    return AutoModel if named[0] in MODEL_MAPPING_NAMES.values() else loader_with_head(config)


def states_check(
    model: PreTrainedModel, states: tuple[int, ...], *, out: Path, show: bool | None
) -> Callable[[Path], None]:
    """Read states of a whole model, which is not kept; give what compares those of a cut.

    That loads a cut, which is to lie at ``out``; ModelError if a bit of a state differs.
    """
    sequences = list(_sequences(Decoder.of(model)))
    load = loader_like(model, kind_of(model.config))
    expected = _states(model, sequences, states)

    def compare(path: Path) -> None:
        with track("compare the states", show=show), TemporaryDirectory() as folder:
            named = Path(folder) / "cut.gguf"
            if path.is_file():
                named.symlink_to(path.absolute())
            found = _states(load(named if path.is_file() else path), sequences, states)
        for (state, want), (_, got) in zip(expected, found, strict=True):
            if not torch.equal(want.view(torch.uint8), got.view(torch.uint8)):  # NaN too
                off = float((want.double() - got.double()).abs().max())
                raise ModelError(
                    f"the cut {out} is not lossless, and is not kept: after a stock reload its "
                    f"state {state} is off by up to {off:.2g}"
                )

    return compare


def _states(
    model: PreTrainedModel,
    sequences: Iterable[tuple[torch.Tensor, torch.Tensor]],
    states: tuple[int, ...],
) -> list[tuple[int, torch.Tensor]]:
    """The states of every batch by their numbers, each (B, T, width), on the CPU."""
    decoder, run = Decoder.of(model), cast("Any", model)
    read: list[tuple[int, torch.Tensor]] = []
    for ids, mask in sequences:
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
        read += [(state, found[state].cpu().contiguous()) for state in states]
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
