"""The tutorial and the notebook, executed on the real model; outputs are those in the page."""

import ast
import inspect
import json
import re

import pytest

import shallower as sh
from tests import tutorial
from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"

pytestmark = pytest.mark.timeout(1200)
"""A minute of one core, which others may want as well."""


@pytest.mark.slow
def test_the_tutorial_prints_what_it_says(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    differences = [
        (block["code"], *lines)
        for block, printed in tutorial.outputs(folder)
        for lines in tutorial.different(block["printed"] or "", printed)
    ]
    assert differences == []
    assert all((folder / made).is_file() for made in tutorial.PICTURES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs(folder, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    bound = {}
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "outputs are cleared"
            code = "".join(cell["source"]).replace("%pip install", "raise SystemExit #")
            exec(compile(code, f"cell {number}", "exec"), bound)
    said = capsys.readouterr().out
    assert "4 layers: [12, 16), angular distance 0.12" in said
    assert 0.3 < bound["more"].mean < 0.8
    assert (folder / "smol-26-layers" / "README.md").is_file()


def calls():
    """The calls of this package in the prose of the notebook, the pages and the README."""
    for page in (NOTEBOOK, ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for call in re.findall(r"`(sh\.\w+\([^`]*\))`", page.read_text(encoding="utf-8")):
            yield call.replace('\\"', '"')


@pytest.mark.parametrize("call", sorted(set(calls())))
def test_calls_in_prose_have_the_parameters_of_their_functions(call):
    """``…`` stands for what is left out."""
    parsed = ast.parse(call.replace("…", "...")).body[0].value
    left_out = [one for one in parsed.args if ast.unparse(one) == "..."]
    bind = inspect.signature(getattr(sh, parsed.func.attr))
    named = {one.arg: None for one in parsed.keywords}
    if left_out:
        bind.bind_partial(**named)
    else:
        bind.bind(*parsed.args, **named)


PRINTED = "drop [12, 16) 0.1270 ± 0.0030\n63 % recovered, 1,008 tokens\n"


@pytest.mark.parametrize(
    ("found", "number"),
    [
        (PRINTED.replace("0.1270", "0.1280").replace("63", "65"), 0),
        (PRINTED.replace("0.1270", "0.1370"), 1),
        (PRINTED.replace("[12", "[13"), 1),
        (f"{PRINTED}more\n", 1),
        ("", 2),
    ],
)
def test_outputs_may_differ_by_rounding_alone(found, number):
    assert len(tutorial.different(PRINTED, found)) == number
