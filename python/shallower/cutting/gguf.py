"""Cutting layers out of a GGUF file directly; sees the core, and neither torch nor gguf.

Nothing is dequantised or loaded: the tensors that stay keep their bytes, and of the metadata
only what speaks of layers, size and name changes. What it cannot describe is refused
(``rust/gguf/rules.rs``).
"""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._core import Gguf
from ..errors import ModelError
from ..progress import BytesProgress, track_copy
from ..storage import check_free, new_file, new_folder, write_file
from ..values.files import PLAN_FILE
from ..values.layers import Layers
from ..values.plan import Plan
from .cards import exports
from .exports import CutFacts, export_path
from .plans import NamedExperts, agreed_plan
from .source import GGUF_KEYS, find_source


@dataclass(frozen=True, slots=True)
class PreparedGguf:
    """A cut of a GGUF file, checked and not yet made.

    Attributes:
        plan: what goes.
        source: the file, its header read.
        num_bytes: of the new file.
        out: the new file, or the folder that gets it.
        gguf: the new file.
        texts: the files beside it that are written anew, by path.
        carried: the files beside it that are copied, by path.
    """

    plan: Plan
    source: Gguf
    num_bytes: int
    out: Path
    gguf: Path
    texts: Mapping[Path, str]
    carried: Mapping[Path, Path]

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

    def write(
        self, *, overwrite: bool = False, progress: BytesProgress | bool | None = None
    ) -> None:
        """Make the cut; OutputError if the place is taken or cannot be written to."""
        self.check_free(overwrite)
        with ExitStack() as stack:
            if self.gguf == self.out:
                new = (stack.enter_context(new_file(path, overwrite)) for path in self.files)
                places = dict(zip(self.files, new, strict=True))
            else:
                folder = stack.enter_context(new_folder(self.out, overwrite))
                places = {path: folder / path.name for path in self.files}
            self.plan.save(places[self._plan_path])
            for path, text in self.texts.items():
                write_file(places[path], text.encode())
            for path, carried in self.carried.items():
                shutil.copyfile(carried, places[path])
            with track_copy(progress, self.num_bytes) as report:
                self.source.cut(list(self.plan.survivors), places[self.gguf], report)


def prepare_gguf(
    source: str | Path,
    layers: Plan | Layers,
    out: str | Path,
) -> PreparedGguf:
    """Check a cut of a GGUF file, and write nothing.

    ``out`` is the new file, ending in ``.gguf``; or a folder, which gets ``NAME.gguf`` and
    ``README.md``. Raises as :func:`.prune.prune`.
    """
    at, out = Path(source).expanduser(), Path(out)
    beside = out.suffix == ".gguf"
    file = Gguf(at)
    wanted = agreed_plan(str(source), file.num_layers, layers)
    num_bytes = file.cut_size(list(wanted.survivors))
    gguf = out if beside else out / f"{out.absolute().name}.gguf"
    known = find_source(at, metadata=file.metadata(list(GGUF_KEYS)))
    options = {} if beside else {"as_gguf": True}
    texts = exports(CutFacts(wanted, known, options=options, gguf=gguf.name))
    return PreparedGguf(
        wanted,
        file,
        num_bytes,
        out,
        gguf,
        {export_path(gguf, name) if beside else out / name: text for name, text in texts.items()},
        {} if beside else {out / name: path for name, path in known.licenses.items()},
    )


def read_metadata(source: Path) -> dict[str, Any]:
    """The values of :data:`GGUF_KEYS` in a GGUF file; none of one whose layers cannot be cut."""
    try:
        return Gguf(source).metadata(list(GGUF_KEYS))
    except ModelError:
        return {}


def plan_gguf(source: Path, layers: Plan | Layers, experts: NamedExperts) -> Plan:
    """The plan that drops experts of a GGUF file, beside layers or alone.

    ModelError: the file counts no experts. Else raises as :func:`.plans.agreed_plan`.
    """
    file = Gguf(source)

    def count() -> int:
        number = file.metadata([key := f"{file.architecture}.expert_count"]).get(key)
        if type(number) is not int or number < 2:
            raise ModelError(f"{source} counts no routed experts: drop whole layers instead")
        return number

    return agreed_plan(str(source), file.num_layers, layers, experts=experts, count_experts=count)


def plan_path(out: str | Path) -> Path:
    """The plan beside a GGUF file: ``model.shallower_plan.json`` beside ``model.gguf``."""
    return export_path(Path(out), PLAN_FILE)
