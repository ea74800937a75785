"""Options that are fields of settings: the command line has each, and reads what is written."""

from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Annotated

import pytest
import typer

import shallower as sh
from shallower import cli
from shallower.cli.options import Cut, Share, with_options
from shallower.settings.options import options_of
from shallower.settings.stages import EvalSettings

COMMANDS = {
    "run": sh.RunSettings,
    "curve": sh.CurveSettings,
    "compare": sh.CompareSettings,
    "heal": sh.Recipe,
    "scan": sh.ScanSettings,
    "patch": sh.PatchSettings,
    "eval": EvalSettings,
}
ONLY_PYTHON = {
    "run": {"num_choosing"},
    "curve": {"num_choosing", "num_patching", "heal"},
    "compare": {"num_choosing", "num_patching", "heal"},
    "heal": set(),
    "scan": set(),
    "patch": set(),
    "eval": set(),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_field_is_an_option_of_the_command(name):
    kind = COMMANDS[name]
    shown = {word for one in cli.parser(name).params for word in (*one.opts, *one.secondary_opts)}
    options = options_of(kind)
    assert {one.name for one in fields(kind)} - options.keys() == ONLY_PYTHON[name]
    for one in options.values():
        assert "--" + one.name.replace("_", "-") in shown


def parsed(kind, *words):
    """The settings that a command makes of words."""
    made = []

    def command(*, settings, device_map=None):
        made.append(settings)

    command.__annotations__ = {"settings": kind}
    app = typer.Typer(add_completion=False)
    app.command()(with_options(command))
    parser = typer.main.get_command(app)
    parser.main(cli._with_values(parser, words), standalone_mode=False)
    return made[0]


@pytest.mark.parametrize(
    "settings",
    [
        *(kind() for name, kind in COMMANDS.items() if name != "heal"),
        sh.RunSettings(params=10**8, batch_size=4, judge="speech", blocks=2, context=64, top=2),
        sh.RunSettings(target_latency=0.8, device="a100-80", prompts=(), max_texts=9),
        sh.RunSettings(target_memory="12GB", heal=True, heal_steps=7, answers=True, share=0.25),
        sh.RunSettings(fraction=0.25, answers=False, prompts="p.jsonl", threads=1, plan_only=True),
        sh.RunSettings(max_loss=0.1, answers="a.jsonl", seed=3, max_length=8),
        sh.CurveSettings(n=(3, 5), criteria=("deepest",), states=("healed",), heal_steps=9),
        sh.CurveSettings(tasks=("boolq", "own"), tasks_dir="t", data="d", pass_at=2),
        sh.CurveSettings(patch="quick", patch_tokens=9, prompts="p.jsonl", speech=True),
        sh.CompareSettings(n=[3], criteria=("deepest", "cka"), judge="kl", device_memory="4GB"),
        sh.CompareSettings(judge="options", options="o.jsonl", max_texts=5, max_eval_texts=6),
        sh.CompareSettings(unit="experts", judge="speech", prompts="p.jsonl"),
        sh.CompareSettings(speech=True),
        sh.ScanSettings(metrics=["cosine"], max_length=9, keep_samples=True, experts=True),
        EvalSettings(texts="t", speech="", context=2, bos=True, tasks_dir=Path("d"), num_shots=0),
        sh.PatchSettings(num_tokens=9, share=0.25, batch_size=2),
        sh.ScanSettings(until=0.9, tolerance=0.1, n=[1, 2], exact=True, threads=2),
    ],
    ids=lambda settings: " ".join([type(settings).__name__, *settings.to_words()]),
)
def test_the_words_of_settings_make_them_again(settings):
    found = parsed(type(settings), *settings.to_words())
    assert found.to_words() == settings.to_words()
    if getattr(settings, "device_memory", None) == "4GB":
        assert found.to_json() == settings.to_json()
    else:
        assert found == settings


@pytest.mark.parametrize(
    ("words", "answers"),
    [((), None), (["--answers="], True), (["--answers", "p"], Path("p"))],
)
def test_an_option_may_stand_without_a_word(words, answers):
    assert parsed(sh.RunSettings, *words).answers == answers


def test_an_option_that_is_taken_away_is_not_there():
    found = parsed(sh.RunSettings, "--answers", "p", "--no-answers", "--speech", "p", "--no-speech")
    assert (found.answers, found.prompts) == (False, ())


def test_options_that_commands_have_together_are_one_value():
    made = []

    def command(*, cut: Annotated[Cut, "drop", "plan"], part: Share, top: int = 1):
        made.append((cut, part, top))

    app = typer.Typer(add_completion=False)
    app.command()(with_options(command))
    words = ["--shard", "0/2", "--drop", "3", "--top", "2"]
    typer.main.get_command(app).main(words, standalone_mode=False)
    assert made == [(Cut(drop="3"), Share(shard="0/2"), 2)]
    assert list(signature(with_options(command)).parameters)[:3] == ["drop", "plan", "shard"]
