"""Tasks found by name: in a folder of the user's, among ours, and in lm-eval."""

import ast
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, TextsError, one_sentence, why
from ..texts.hub import read_caches
from ..texts.sources import numbered_records

OURS = Path(__file__).with_name("task_data")
"""The folder of our task files."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TaskGroup:
    """Tasks of lm-eval that one name stands for; parts of one task are scored ``together``."""

    name: str
    tasks: Mapping[str, Any]
    together: bool


def data_folder(data: str | Path | None) -> Path | None:
    """The folder in which task files find their data: ``data``, else SHALLOWER_DATA, else none.

    Raises TextsError where it is no folder.
    """
    named = data if data is not None else os.environ.get("SHALLOWER_DATA")
    return None if not named else _folder(named, "data of tasks (data, --data, SHALLOWER_DATA)")


def find_tasks(
    names: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    data: str | Path | None = None,
) -> list[TaskGroup]:
    """Load tasks by name, from ``tasks_dir``, our own task files or lm-eval, in this order.

    Our own need a folder of data; relative ``data_files`` lie there or beside the task file.
    TextsError for a missing or damaged task or data, MissingExtraError without lm-eval.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "tasks", "evaluating tasks") from error
    if not names or any(not name.strip() for name in names):
        raise TextsError("name at least one task, as boolq (tasks, --tasks)")
    if len(set(names)) < len(names):
        raise TextsError(f"a task is named twice: {', '.join(names)}")
    there = data_folder(data)
    folders = _folders(there, tasks_dir)
    if tasks_dir is not None:
        _require_yaml(folders[-1])
    manager: Any = TaskManager(include_path=list(folders), include_defaults=False)
    local = _Local(manager.task_index, there)
    if any(not local.knows(name) for name in names):
        manager = TaskManager(include_path=list(folders), include_defaults=True)
        local = _Local(manager.task_index, there)
    for name in names:
        if not local.knows(name):
            raise _unknown(name, folders, there)
    return [local.load(name, manager) for name in names]


def check_names(
    names: Sequence[str], tasks_dir: str | Path | None, data: str | Path | None
) -> None:
    """Refuse a name that no task file holds by a TextsError, before lm-eval is imported."""
    own = [] if tasks_dir is None else [Path(tasks_dir)]
    package = find_spec("lm_eval")
    theirs = (package.submodule_search_locations if package else None) or ()
    missing = {*names} if package else set()
    for path in (path for folder in (OURS, *own, *theirs) for path in Path(folder).rglob("*.yaml")):
        if not missing:
            return
        text = path.read_bytes()
        missing = {name for name in missing if name.encode() not in text}
    for name in sorted(missing):
        raise _unknown(name, own, data_folder(data))


def files_in(folder: str | Path) -> list[Path]:
    """List the files of a folder of tasks, but compiled code, and own modules that they import.

    LookupError for an import that is not found.
    """
    files = (path for path in Path(folder).glob("**/*") if path.is_file())
    found = dict.fromkeys(sorted(path for path in files if "__pycache__" not in path.parts))
    here, left = {path.stem for path in found}, [path for path in found if path.suffix == ".py"]
    while left:
        for name in _imported(left.pop()) - here:
            more = [path for path in _files_of_module(name) if path not in found]
            found |= dict.fromkeys(more)
            left += more
    return list(found)


def _imported(file: Path) -> set[str]:
    """The modules, but Python's own, that a file imports."""
    try:
        nodes = [*ast.walk(ast.parse(file.read_bytes()))]
    except (OSError, SyntaxError, ValueError, RecursionError):  # its own import says what is wrong
        return set()
    names = {one.name for node in nodes if isinstance(node, ast.Import) for one in node.names}
    names |= {str(one.module) for one in nodes if isinstance(one, ast.ImportFrom) and not one.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def _files_of_module(name: str) -> list[Path]:
    """The files of a module of the user's, none of an installed one; LookupError where it is not.

    What is installed has a version.
    """
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise LookupError(name)
    place = Path(spec.origin)
    if {"site-packages", "dist-packages"} & {*place.parts} or name == __package__.partition(".")[0]:
        return []
    return sorted(place.parent.glob("**/*.py")) if place.name == "__init__.py" else [place]


def files_of(
    names: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    data: str | Path | None = None,
) -> list[Path] | None:
    """Find the files that task scores depend on (tasks, code, data), without lm-eval.

    None where a task is not from here, or has more than rows of JSON lines.
    """
    there = data_folder(data)
    found: dict[Path, None] = {}
    known: set[str] = set()
    wanted = set(names)
    for folder in _folders(there, tasks_dir):
        try:
            files = files_in(folder)
        except LookupError:
            return None
        for path in files:
            found[path] = None
            content = None if path.suffix not in ("", ".yaml") else _content(path)
            if not isinstance(content, dict):
                continue
            if content.get("dataset_path", "json") != "json" or {"class", "custom_dataset"} & {
                *content
            }:
                return None
            children = content.get("task")
            known |= {str(content.get("group")), str(children), *_listed(content.get("tag"))}
            if isinstance(children, list):
                wanted |= {str(_of(one, "task") or _of(one, "group") or one) for one in children}
            named = _of(content.get("dataset_kwargs"), "data_files")
            for one in _listed(list(named.values()) if isinstance(named, dict) else named):
                for place in _places(path, there):
                    if (place / str(one)).is_file():
                        found[place / str(one)] = None
                        break
    local = all(any(f"{name}_".startswith(f"{one}_") for one in known) for name in wanted)
    return list(found) if local else None


class _Local:
    """lm-eval's index of task files, some with data in files here; a split of a task changes it."""

    def __init__(self, index: dict[str, Any], data: Path | None) -> None:
        self._index, self._data = index, data
        self._read: dict[Path, Rows] = {}
        self._parts: dict[str, list[str]] = {}
        self._part_of: dict[str, tuple[str, str]] = {}
        self._absence: str | None = None

    def knows(self, name: str) -> bool:
        """Whether there is such a task; where it is a part of another, that one is split."""
        for whole in [one for one in self._index if f"{name}_".startswith(f"{one}_")]:
            if whole not in self._parts and whole not in self._part_of:
                self._split(whole)
        return name in self._index

    def _split(self, name: str) -> None:
        """Make a task for each value of the field that a task file wants to be split by."""
        entry = self._index[name]
        field = _of(_of(entry.cfg, "metadata"), "split_by")
        if not isinstance(field, str):
            return
        files = self._files(entry)
        split = entry.cfg.get("test_split") or entry.cfg.get("validation_split")
        values = dict.fromkeys(str(row.get(field)) for row in self._rows(files[split]))
        self._parts[name] = [f"{name}_{value}" for value in values]
        for part, value in zip(self._parts[name], values, strict=True):
            self._index[part] = replace(entry, name=part)
            self._part_of[part] = (field, value)

    def load(self, name: str, manager: Any) -> TaskGroup:
        """Build the tasks that a name stands for."""
        leaves = list(self._leaves(name))
        try:
            loaded = manager.load([{"group": name, "task": leaves}])
        except (TextsError, MissingExtraError):
            raise
        except Exception as error:  # whatever a task file, its functions or a hub raise
            hint = "" if self._data else "; --data (data, SHALLOWER_DATA) names a folder of data"
            raise TextsError(
                f"task {name} cannot be loaded: {self._absence or one_sentence(error)}{hint}"
            ) from error
        together = name in self._parts or self._index[name].kind.name == "GROUP"
        return TaskGroup(name, loaded["tasks"], together)

    def _leaves(self, name: str, overrides: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """The tasks behind a name, as lm-eval takes them in a group."""
        entry = self._index.get(name)
        if name in self._parts:
            for part in self._parts[name]:
                yield self._leaf(part, overrides or {})
        elif entry is None or entry.kind.name in ("TASK", "PY_TASK"):
            yield self._leaf(name, overrides or {})
        elif entry.kind.name == "TAG":
            for one in sorted(entry.tags):
                yield from self._leaves(one, overrides)
        else:
            for child in entry.cfg.get("task") or []:
                item = {"task": child} if isinstance(child, str) else dict(child)
                called = item.pop("task", None) or item.pop("group", None)
                yield from self._leaves(str(called), {**(overrides or {}), **item})

    def _leaf(self, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        leaf = {**overrides, "task": name}
        entry = self._index.get(name)
        cfg = {**(entry.cfg or {} if entry else {}), **overrides}
        if "/" in str(cfg.get("dataset_path")):
            self._absence = self._absence or read_caches()
        if cfg.get("dataset_path") != "json" or "data_files" not in (
            cfg.get("dataset_kwargs") or {}
        ):
            return leaf
        files = self._files(entry, cfg)
        return {**leaf, "dataset_kwargs": None, "custom_dataset": self._reader(name, files)}

    def _reader(self, name: str, files: Mapping[str, list[Path]]) -> Callable[..., Any]:
        def read(**_: Any) -> dict[str, Any]:
            from datasets import Dataset

            found = {}
            for split, paths in files.items():
                rows = self._rows(paths)
                if name in self._part_of:
                    field, value = self._part_of[name]
                    rows = [row for row in rows if str(row.get(field)) == value]
                found[split] = Dataset.from_list(rows)
            return found

        return read

    def _files(self, entry: Any, cfg: Mapping[str, Any] | None = None) -> dict[str, list[Path]]:
        """The files of every split."""
        named = (cfg or entry.cfg)["dataset_kwargs"]["data_files"]
        if not isinstance(named, dict):
            named = {"train": named}
        places = _places(entry.yaml_path, self._data)
        return {
            split: [_find(str(one), places, entry.name) for one in _listed(paths)]
            for split, paths in named.items()
        }

    def _rows(self, paths: Sequence[Path]) -> Rows:
        rows: Rows = []
        for path in paths:
            if path not in self._read:
                self._read[path] = list(_records(path))
            rows += self._read[path]
        return rows


def _of(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _listed(value: Any) -> list[Any]:
    """A list with its lists opened; of a single value, that one."""
    if not isinstance(value, list):
        return [] if value is None else [value]
    return [one for item in value for one in _listed(item)]


def _places(task_file: Path, data: Path | None) -> list[Path]:
    """Where the data of a task file may lie: ours have none beside them."""
    beside = [] if task_file.parent == OURS else [task_file.parent]
    return [*([] if data is None else [data]), *beside]


def _folders(data: Path | None, tasks_dir: str | Path | None) -> list[Path]:
    """The folders of task files: our own where there is data for them, and one that is named."""
    own = [OURS] if data is not None else []
    if tasks_dir is None:
        return own
    return [*own, _folder(tasks_dir, "task files (tasks_dir, --tasks-dir)")]


def _folder(named: str | Path, what: str) -> Path:
    try:
        folder = Path(named).expanduser()
        if folder.is_dir():
            return folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise TextsError(f"cannot read the {what} in {named}: {why(error, named)}") from error
    raise TextsError(f"there is no folder {named} with the {what}")


def _find(name: str, places: Sequence[Path], task: str) -> Path:
    """A file of data by its name, in the first of the places that has it."""
    for place in places:
        if (place / name).is_file():
            return place / name
    looked = " or ".join(map(str, places)) or "any folder"
    raise TextsError(
        f"the data of task {task} is not there: no {name} in {looked}; name the folder that has it "
        f"(data, --data, or the variable SHALLOWER_DATA)"
    )


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, record in numbered_records(path, str(path)):
        if not isinstance(record, dict):
            raise TextsError(f"{path}, line {number}: expected a JSON object")
        yield record


def _content(path: Path) -> Any:
    """What is in a task file; None where it is no YAML."""
    try:
        return _read_yaml(path)
    except TextsError:
        return None


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML whose tags, as lm-eval's ``!function``, are not looked into."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        return yaml.load(path.read_bytes(), Loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise TextsError(f"the task file {path} is no YAML: {why(error, path)}") from error


def _require_yaml(folder: Path) -> None:
    """Refuse task files that lm-eval would pass over without a word."""
    for path in sorted(folder.glob("**/*.yaml")):
        content = _read_yaml(path)
        if not isinstance(content, dict):
            raise TextsError(
                f"the task file {path} is no task: expected a mapping with the key task or group"
            )
        for name in _listed(content.get("include")):
            if not (path.parent / str(name)).is_file():
                raise TextsError(f"the task file {path} includes {name}, which is not there")


def _unknown(name: str, folders: Sequence[Path], data: Path | None) -> TextsError:
    looked = [str(one) for one in folders if one != OURS]
    ours = sorted(path.stem for path in OURS.glob("*.yaml"))
    way_out = "" if data else f"; {', '.join(ours)} are here, once --data names their data"
    return TextsError(
        f"there is no task {name}{' in ' + looked[0] if looked else ''}, among ours "
        f"({', '.join(ours)}) or in lm-eval{way_out} (tasks, --tasks; tasks_dir, --tasks-dir)"
    )
