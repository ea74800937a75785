"""One random change of a result: of a byte, of a file, or of a value in its record."""

import json
from pathlib import Path

from shallower.storage import RESULT_RECORD


def change_at_random(chance):
    """Change one thing in the results that lie here as ``made``; says which."""
    files = sorted(
        path for path in Path().rglob("*") if path.is_file() and path.parts[0][:4] == "made"
    )
    if chance.random() < 0.4:
        path = chance.choice([one for one in files if one.name.endswith(RESULT_RECORD)])
        record = json.loads(path.read_text())
        where = _change_value(record, chance)
        path.write_text(json.dumps(record, indent=2) + "\n")
        return f"{path}: {where}"
    path = chance.choice(files)
    kind = chance.choice(["flipped", "flipped", "flipped", "shorter", "longer", "removed", "added"])
    _CHANGES[kind](path, chance)
    return f"{path}: {kind}"


def _flip(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _add(path, chance):
    beside = path.with_name(f"{path.name}.{chance.randrange(1000)}")
    (path if path.parent == Path() else beside).write_bytes(b"{}")  # a GGUF file has no folder


_CHANGES = {
    "flipped": _flip,
    "shorter": lambda path, chance: path.write_bytes(path.read_bytes()[: -chance.randint(1, 9)]),
    "longer": lambda path, _: path.write_bytes(path.read_bytes() + b" "),
    "removed": lambda path, _: path.unlink(),
    "added": _add,
}


def _change_value(value, chance):
    """Change a value somewhere inside another one; says where."""
    keys = [*value] if isinstance(value, dict) else range(len(value))
    if not keys or chance.random() < 0.05:
        value.update(more=1) if isinstance(value, dict) else value.append(1)
        return "more"
    key = chance.choice([*keys])
    inside = value[key]
    if isinstance(inside, dict | list) and chance.random() < 0.95:
        return f"{key}.{_change_value(inside, chance)}"
    if isinstance(inside, str) and inside and chance.random() < 0.8:
        at = chance.randrange(len(inside))
        value[key] = f"{inside[:at]}{chance.choice('0ax/')}{inside[at + 1 :]}"
    if value[key] == inside:
        others = [None, True, 0, -1, 0.5, "", "x", "../x", [], {}, float("nan")]
        value[key] = chance.choice([one for one in others if repr(one) != repr(inside)])
    return f"{key}: {inside!r:.40} -> {value[key]!r:.40}"
