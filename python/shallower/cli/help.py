"""The help of a command: its basic options on one screen, the other groups by their names."""

from textwrap import wrap
from typing import Any, get_args

import typer
from typer.core import TyperCommand

from ..settings.options import Group

FEW = 10
"""Options of a command, at most, that are shown without being asked for all of them."""


WIDEST = 20
"""Characters of an option beside which its help stands; below a longer one."""


class GroupedCommand(TyperCommand):
    """A command with its options in groups, all of which are shown by ``--help-all``."""

    def shows_all(self, context: Any) -> bool:
        """Whether all options are shown: if they are few, or asked for."""
        return len(self.params) <= FEW or "help_all" in context.meta

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the command does: one sentence where only basic options are shown."""
        if self.shows_all(ctx):
            super().format_help_text(ctx, formatter)
            return
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(str(self.help).partition("\n\n")[0])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, the basic options, and the other groups or their names."""
        groups: dict[str, list[Any]] = {name: [] for name in ("arguments", *get_args(Group))}
        params: list[Any] = self.get_params(ctx)
        for one in params:
            is_argument = one.param_type_name == "argument"
            groups["arguments" if is_argument else one.rich_help_panel or "basic"].append(one)
        behind = {}
        for name, found in groups.items():
            if found and (name in ("arguments", "basic") or self.shows_all(ctx)):
                with formatter.section("Options" if name == "basic" else name.capitalize()):
                    formatter.write_dl([one.get_help_record(ctx) for one in found], WIDEST)
            elif found:
                words = " ".join(word for one in found for word in one.opts)
                lines = wrap(words, formatter.width - len("  measures    "), break_on_hyphens=False)
                behind[name] = "\n".join(["\b", *lines])
        if behind:
            with formatter.section("More options, explained by --help-all"):
                formatter.write_dl([*behind.items()])


def _show_all(context: typer.Context, is_asked: bool) -> None:
    if is_asked and not context.resilient_parsing:
        context.meta["help_all"] = True
        print(context.get_help())
        raise typer.Exit


ALL: Any = typer.Option(
    False,
    "--help-all",
    help="Show all options, with all that the command does.",
    callback=_show_all,
    is_eager=True,
    expose_value=False,
)
"""The option of every command that shows its whole help."""


_SETS = "HuggingFaceTB/SmolLM2-135M --texts c4.jsonl --eval-texts c4_eval.jsonl"

EXAMPLES = {
    "scan": "HuggingFaceTB/SmolLM2-135M --texts c4.jsonl --out scans/smol",
    "gather": "scans/shards --out scans/smol",
    "analyse": "states.safetensors --out scans/smol",
    "plan": "scans/smol --n 8 --out plans/smol-8",
    "compare": f"{_SETS} --n 1,2,4 --out comparisons/smol",
    "curve": f"{_SETS} --n 1,2,4,8 --out curves/smol",
    "prune": "HuggingFaceTB/SmolLM2-135M --drop 12:20 --out cut",
    "eval": "HuggingFaceTB/SmolLM2-135M --texts c4_eval.jsonl --drop 12:20",
    "gain": "HuggingFaceTB/SmolLM2-135M --drop 12:20 --forecast-device a100-80",
    "patch": "HuggingFaceTB/SmolLM2-135M --drop 12:20 --texts c4.jsonl --out patched",
    "heal": "cut --texts c4.jsonl --eval-texts c4_eval.jsonl --steps 200 --out healed --merge",
    "merge": "adapters --out healed",
    "run": f"{_SETS} --n 8 --out runs/smol",
    "demo": "--out shallower-demo",
    "reproduce": "patched --model SmolLM2-135M --texts c4.jsonl",
    "report": "runs/smol",
    "cache": "--clear",
    "info": "--json",
}
"""Arguments that show each command."""


def example(name: str) -> str:
    """The example of a command, on lines for a shell that do not part an option from its value."""
    options = EXAMPLES.get(name, "").replace(" ", "\xa0").replace("\xa0--", " --")
    lines = wrap(
        f"shallower {name} {options}",
        68,
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "\b\nExample:\n  " + " \\\n  ".join(lines).replace("\xa0", " ")
