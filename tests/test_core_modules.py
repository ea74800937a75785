"""The modules of the Rust core: none needs, by way of others, itself."""

import re

import pytest

from tests import house
from tests.conftest import ROOT

TESTS = re.compile(r"#\[cfg\(test\)\]\s*mod \w+ \{.*?^\}", re.DOTALL | re.MULTILINE)
TEST_FILES = re.compile(r"#\[cfg\([^\n]*\btest\b[^\n]*\)\]\s*mod (\w+);")


def code(file):
    """A file without comments and its tests."""
    text = re.sub(r"//.*", "", file.read_text(encoding="utf-8"))
    return TESTS.sub("", text)


def named(text, root):
    """The names behind ``crate::`` or ``super::``, grouped or not."""
    for match in re.finditer(root + r"::(?:(\w+)|\{)", text):
        if match[1]:
            yield match[1]
            continue
        depth, item = 0, ""
        for char in text[match.end() :]:
            depth += {"{": 1, "}": -1}.get(char, 0)
            if depth < 0:
                break
            if char == "," and not depth:
                yield re.match(r"\s*(\w*)", item)[1]
                item = ""
            else:
                item += char
        yield re.match(r"\s*(\w*)", item)[1]


def exported(file):
    """Name -> module, for what a file gives on from the modules below it."""
    found = {}
    for module, one, group in re.findall(
        r"pub(?:\(\w+\))? use (?:self::)?(\w+)::(?:(\w+)|\{(.*?)\});", code(file), re.DOTALL
    ):
        found |= dict.fromkeys(re.findall(r"\w+", one or group), module)
    return found


def needs(folder, root, home):
    """Module -> the modules beside it that it needs; one with a folder is one with all in it."""
    test_files = {
        name for file in folder.rglob("*.rs") for name in TEST_FILES.findall(file.read_text())
    }
    given = exported(folder / home)
    modules = {file.stem for file in folder.iterdir()} - {home.removesuffix(".rs")}
    graph = {module: set() for module in modules - test_files}
    for file in folder.rglob("*.rs"):
        module = file.relative_to(folder).parts[0].removesuffix(".rs")
        if module in graph and file.stem not in test_files:
            names = {given.get(name, name) for name in named(code(file), root)}
            graph[module] |= (names & set(graph)) - {module}
    return graph


def test_no_modules_of_the_core_go_in_a_circle():
    graph = needs(ROOT / "rust", "crate", "lib.rs")
    assert {"error", "accumulator", "kernels", "search", "checkpoint"} <= set(graph)
    assert graph["limits"] == set()
    assert graph["error"] == {"limits"}
    assert {"states", "error", "gram"} <= graph["accumulator"]
    assert house.circle(graph) is None


@pytest.mark.parametrize("folder", ["checkpoint", "gguf", "kernels"])
def test_no_modules_of_a_folder_go_in_a_circle(folder):
    graph = needs(ROOT / "rust" / folder, "super", "mod.rs")
    assert any(graph.values())
    assert house.circle(graph) is None


@pytest.mark.parametrize(
    "line",
    [
        "use crate::states::States;",
        "use crate::{metric::{Metric, Pair}, Order};",
        "const MOST: usize = crate::states::MOST;",
        "fn of(states: &crate::States) {}",
    ],
)
def test_a_circle_is_found(line, tmp_path):
    (tmp_path / "lib.rs").write_text("mod error;\nmod states;\npub use states::{Order, States};\n")
    (tmp_path / "states.rs").write_text("use crate::error::Error; // crate::metric::Metric\n")
    (tmp_path / "error.rs").write_text("")
    assert house.circle(needs(tmp_path, "crate", "lib.rs")) is None
    in_a_test = f"#[cfg(test)]\nmod tests {{\n    {line}\n}}\n"
    (tmp_path / "error.rs").write_text(in_a_test)
    assert house.circle(needs(tmp_path, "crate", "lib.rs")) is None
    (tmp_path / "error.rs").write_text(line)
    assert {*house.circle(needs(tmp_path, "crate", "lib.rs"))} == {"error", "states"}
