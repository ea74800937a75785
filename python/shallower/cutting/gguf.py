"""Cutting layers and experts out of a GGUF file; sees the core, and neither torch nor gguf.

Nothing is dequantised or loaded: the tensors that stay keep their bytes. Metadata changes only
where it is about layers, experts, size or name. What it cannot describe is refused
(``rust/gguf/rules.rs``). The card is ``NAME.README.md`` beside the file, or ``README.md`` in a
folder of its own (``as_gguf``): the caller decides, whatever the folder holds.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._core import Gguf
from ..errors import ModelError
from ..progress import BytesProgress, track_copy
from ..storage import check_free, check_ours, new_file, new_folder, write_file
from ..values.experts import Routing
from ..values.files import PLAN_FILE
from ..values.plan import Plan
from .cards import exports
from .exports import CutFacts, export_path
from .mixture import Mixture
from .plans import NamedExperts, NamedLayers, agreed_plan
from .source import GGUF_KEYS, find_source

if TYPE_CHECKING:
    from ..results.loss import Loss

EXPERT_KEYS = ("count", "used_count", "group_count", "group_used_count")
"""The keys by which a GGUF file says how a token is sent to experts, behind ``ARCH.expert_``."""


@dataclass(frozen=True, slots=True)
class PreparedGguf:
    """A cut of a GGUF file, checked and not yet made."""

    plan: Plan
    source: Gguf  # its header read
    num_bytes: int  # of the new file
    out: Path  # the new file, or the folder that gets it
    gguf: Path  # the new file
    texts: Mapping[Path, str]  # written anew beside it
    carried: Mapping[Path, Path]  # copied beside it

    @property
    def files(self) -> list[Path]:
        """All files of the cut, the GGUF file and its plan first."""
        return [self.gguf, self._plan_path, *self.texts, *self.carried]

    @property
    def _plan_path(self) -> Path:
        beside = self.gguf == self.out
        return plan_path(self.gguf) if beside else self.gguf.with_name(PLAN_FILE)

    def check_free(self, overwrite: bool = False) -> None:
        """Refuse a place that is taken: OutputError."""
        for path in self.files if self.gguf == self.out else [self.out]:
            check_free(path, overwrite)
        if self.gguf == self.out and not self._plan_path.exists():  # not of an earlier cut
            check_ours(self.out, [path.name for path in self.texts if path.exists()])

    def write(
        self,
        *,
        overwrite: bool = False,
        progress: BytesProgress | bool | None = None,
        check: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Make the cut; ``check`` gets the new file before it takes its place."""
        self.check_free(overwrite)
        with ExitStack() as stack:
            if self.gguf == self.out:
                new = (stack.enter_context(new_file(path, overwrite)) for path in self.files)
                places = dict(zip(self.files, new, strict=True))
            else:
                folder = stack.enter_context(new_folder(self.out, overwrite))
                places = {path: folder / path.name for path in self.files}
            with track_copy(progress, self.num_bytes) as report:
                survivors, experts = list(self.plan.survivors), _kept_experts(self.plan)
                self.source.cut(survivors, places[self.gguf], report, experts=experts)
            self.plan.save(places[self._plan_path])
            for path, text in self.texts.items():
                write_file(places[path], text.encode())
            for path, carried in self.carried.items():
                shutil.copyfile(carried, places[path])
            check(places[self.gguf])


def prepare_gguf(
    source: str | Path,
    layers: NamedLayers,
    out: str | Path,
    *,
    losses: "tuple[Loss, ...] | None" = None,
    tested: str = "",
    command: str = "",
) -> PreparedGguf:
    """Check a cut of a GGUF file, and write nothing.

    ``out`` is the new file, ending in ``.gguf``; or a folder, which gets ``NAME.gguf`` and
    ``README.md``. ``losses``, ``tested`` and ``command`` are as in :class:`.exports.CutFacts`.
    """
    at, out = Path(source).expanduser(), Path(out)
    beside = out.suffix == ".gguf"
    file = Gguf(at)
    wanted = agreed_plan(str(source), file.num_layers, layers)
    _check_experts(file, wanted, named=str(source))
    num_bytes = file.cut_size(list(wanted.survivors), _kept_experts(wanted))
    gguf = out if beside else out / f"{out.absolute().name}.gguf"
    known = find_source(at, metadata=file.metadata(list(GGUF_KEYS)))
    options = {} if beside else {"as_gguf": True}
    facts = CutFacts(
        wanted,
        known,
        options=options,
        losses=losses,
        tested=tested,
        gguf=gguf.name,
        command=command,
    )
    texts = exports(facts)
    return PreparedGguf(
        wanted,
        file,
        num_bytes,
        out,
        gguf,
        {export_path(gguf, name) if beside else out / name: text for name, text in texts.items()},
        {} if beside else {out / name: path for name, path in known.licenses.items()},
    )


def check_any_cut(file: Path) -> None:
    """Refuse a file of which layers cannot go one by one, before cuts of it are compared."""
    try:
        prepare_gguf(file, [0], "cut.gguf")
    except ModelError as error:
        raise ModelError(
            f"{error}; a run compares all kinds of cuts: leave out patch=False (--no-patch), or "
            f"measure those that can be (shallower eval --drop) and make one (shallower prune)",
            see="gguf",
        ) from error


def _kept_experts(plan: Plan) -> tuple[int, dict[int, tuple[int, ...]]] | None:
    """The number of a layer's experts and those that stay, as the core takes them."""
    dropped = plan.experts
    if dropped is None:
        return None
    return dropped.num_experts, {layer: dropped.kept(layer) for layer in dropped.by_layer}


def _check_experts(file: Gguf, plan: Plan, *, named: str) -> None:
    """Refuse experts that the file has not, or that its router cannot do without."""
    if plan.experts is None:
        return
    layers = file.expert_layers
    if not layers:
        raise ModelError(
            f"{named} has no layer with routed experts: drop whole layers instead", see="experts"
        )
    mixture = Mixture(named, _routing(file, named), frozenset(layers))
    mixture.check(plan.experts, gone=plan.dropped)


def _routing(file: Gguf, named: str) -> Routing:
    """How llama.cpp sends a token to experts, by the file's metadata."""
    keys = [f"{file.architecture}.expert_{name}" for name in EXPERT_KEYS]
    found = file.metadata(keys)
    for key in keys[:2]:
        if not isinstance(found.get(key), int):
            raise ModelError(
                f"{named}: {key} is missing, or not one whole number for all layers: no expert "
                f"can go"
            )
    number, chosen, groups, groups_chosen = (found.get(key, 0) for key in keys)
    if groups in (0, 1):
        return Routing(number, chosen)
    if not isinstance(groups, int) or number % groups or not isinstance(groups_chosen, int):
        raise ModelError(
            f"{named}: {keys[2]} is {groups} and {keys[3]} {groups_chosen}, expected groups of as "
            f"many of the {number} experts, and how many groups are chosen"
        )
    return Routing(number, chosen, groups, groups_chosen, two_decide=True)


def read_metadata(source: Path) -> dict[str, Any]:
    """The values of :data:`GGUF_KEYS` in a GGUF file; none of one whose layers cannot be cut."""
    try:
        return Gguf(source).metadata(list(GGUF_KEYS))
    except ModelError:
        return {}


def plan_gguf(source: Path, layers: NamedLayers, experts: NamedExperts) -> Plan:
    """The plan that drops experts of a GGUF file, beside layers or alone."""
    file = Gguf(source)

    def count() -> int:
        number = file.metadata([key := f"{file.architecture}.expert_count"]).get(key)
        if type(number) is not int or number < 2:
            raise ModelError(
                f"{source} counts no routed experts: drop whole layers instead", see="experts"
            )
        return number

    return agreed_plan(str(source), file.num_layers, layers, experts=experts, count_experts=count)


def plan_path(out: str | Path) -> Path:
    """The plan beside a GGUF file: ``model.shallower_plan.json`` beside ``model.gguf``."""
    return export_path(Path(out), PLAN_FILE)
