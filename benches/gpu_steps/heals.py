"""Healing: against a plain loop, on a real model, killed, merged, and by several processes."""

import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import shallower as sh
from shallower.studies import demo


def recipe_of(setting):
    """The paper's recipe for Llama-2-7B, for 20 steps."""
    paper = sh.Recipe("llama-2-7b", steps=20, warmup_steps=2, packing=False)
    small = sh.Recipe(steps=2, warmup_steps=0, max_length=32, rank=2, packing=False)
    return setting.pick(paper, replace(small, dtype=setting.plain))


def heal(setting):
    """The paper's 7B recipe: tokens a second against a plain loop of peft and the Trainer."""
    recipe = recipe_of(setting)
    max_length = recipe.max_length or 2048
    texts = setting.texts(16 * recipe.steps, max_length)
    folder = setting.work / "7b-adapters"
    with setting.peak() as memory:
        done = sh.heal(
            setting.cut("7b"), texts, folder, recipe=recipe, overwrite=True, progress=False
        )
    with setting.peak() as of_plain:
        plain = _plain_loop(setting, texts, done.recipe)
    ours = statistics.fmean(step.loss for step in done.steps)
    difference = abs(ours - statistics.fmean(plain["losses"]))
    assert difference < 0.02 * ours, f"the losses of both loops differ by {difference:.2g}"
    return {
        "shape": "7b",
        "recipe": done.recipe.to_json(),
        "tokens_per_second": done.tokens_per_second,
        "tokens_per_second_of_plain_loop": plain["tokens_per_second"],
        "throughput_ratio": done.tokens_per_second / plain["tokens_per_second"],
        "seconds_of_steps_of_plain_loop": plain["seconds"],
        "mean_loss": ours,
        "difference_of_mean_losses": difference,
        "memory": memory,
        "planned": setting.planned(setting.cut("7b"), "heal", recipe=recipe),
        "memory_of_plain_loop": of_plain,
    }


class _Rows(Dataset):
    """Full sequences, one after the other."""

    def __init__(self, tokenizer, texts, max_length):
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        assert {len(ids) for ids in encoded} == {max_length}
        self.rows = [{"input_ids": ids, "labels": ids} for ids in encoded]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class _Clock(TrainerCallback):
    """The seconds and losses of every step."""

    def __init__(self, setting):
        self.setting, self.seconds, self.losses = setting, [], []

    def on_step_begin(self, *_args, **_options):
        self.began = time.perf_counter()

    def on_step_end(self, *_args, **_options):
        self.setting.wait()
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, _args, _state, _control, logs, **_options):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def _plain_loop(setting, texts, recipe):
    """What one writes without shallower, at the same settings."""
    from peft import LoraConfig, get_peft_model

    options = {"device_map": {"": str(setting.device)}}
    if recipe.dtype == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(setting.cut("7b"), dtype=dtype, **options)
    model.requires_grad_(False)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=recipe.rank,
        lora_dropout=recipe.dropout, target_modules=["gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    clock = _Clock(setting)
    arguments = TrainingArguments(
        output_dir=str(setting.work / "plain-loop"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=16 // recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        weight_decay=0.0,
        optim="adamw_torch",
        bf16=recipe.dtype != "float32",
        activation_checkpointing=recipe.recompute,
        activation_checkpointing_kwargs={"use_reentrant": False} if recipe.recompute else None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not setting.cuda,
    )
    rows = _Rows(setting.tokenizer, texts, recipe.max_length)
    trainer = Trainer(
        get_peft_model(model, lora), arguments, default_data_collator, rows, callbacks=[clock]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert len(clock.losses) == recipe.steps
    return {
        "tokens_per_second": 16 * recipe.max_length * recipe.steps / sum(clock.seconds),
        "seconds": clock.seconds,
        "losses": clock.losses,
    }


def run_heal(setting):
    """The whole way on SmolLM2: what the patch and the training give back of the lost nats."""
    source = sh.ModelSource(demo.model_path(), setting.plain, str(setting.device))
    count, max_length = setting.pick((640, 256), (40, 48))
    calibration, held_out = demo.texts(None, 600, setting.pick(24, 2))
    texts = [*calibration, *setting.texts(count, max_length)][: setting.pick(1200, count)]
    recipe = setting.pick(
        sh.Recipe(steps=100, dtype=setting.plain),
        sh.Recipe(steps=2, dtype=setting.plain, max_length=32, rank=4, warmup_steps=0),
    )
    few = {"n": 1, "top": 1, "answers": False, "prompts": ["Name a river.", "Count to three."]}
    asked, found = setting.pick({"n": 8}, few), {}

    def work():
        found["done"] = sh.run(
            source, texts=texts, eval_texts=held_out, out=setting.work / "run",
            max_length=max_length, heal=recipe, overwrite=True, progress=False, **asked,
        )  # fmt: skip

    with setting.peak() as memory:
        taken = setting.seconds(work)
    done = found["done"]
    best, healing = done.recommended, done.healing
    assert healing is not None, f"nothing was healed: {best.unhealed}"
    whole, cut, healed = best.whole.nats, best.cut.nats, healing.merge.loss.nats
    assert healed < cut, "the healed model is not better than the cut"
    return {
        "model": "SmolLM2-135M-Instruct",
        "steps": recipe.steps,
        "blocks": [[block.start, block.stop] for block in best.plan.blocks],
        "loss": whole,
        "loss_of_cut": cut,
        "loss_before_training": healing.before.nats,
        "loss_healed": healed,
        "recovered": (cut - healed) / (cut - whole),
        "max_logits_difference": done.difference,
        "tokens_per_second": healing.tokens_per_second,
        "seconds": taken,
        "memory": memory,
    }


def kill_and_resume(setting):
    """A healing killed after its first checkpoint ends with the weights of one that was not."""
    work = setting.work / "killed"
    shutil.rmtree(work, ignore_errors=True)  # of an earlier call
    work.mkdir()
    command = [*_heal_command(setting), "--steps", "12", "--eval-every", "3"]
    _call([*command, "--out", str(work / "whole")])
    process = subprocess.Popen([*command, "--out", str(work / "out")], cwd=setting.work)
    while not list(work.rglob("checkpoint-*/complete")):
        assert process.poll() is None, "the healing ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "out").exists(), "the healing was over before it could be killed"
    taken = setting.seconds(_call, [*command, "--out", str(work / "out")])
    whole, resumed = (
        load_file(work / name / "adapter_model.safetensors") for name in ("whole", "out")
    )
    difference = max(float((whole[name] - resumed[name]).abs().max()) for name in whole)
    largest = max(float(value.abs().max()) for value in whole.values())
    assert difference <= 1e-3 * largest, f"the resumed adapters differ by {difference:.2g}"
    steps = json.loads((work / "out" / "healing.json").read_text())["steps"]
    assert len(steps) == 12
    return {
        "steps": 12,
        "seconds_of_resumed": taken,
        "same_bits": difference == 0,
        "max_difference": difference,
        "largest_weight": largest,
    }


def merge(setting):
    """The adapters of (d) merged: every tensor against W + B·A, added here."""
    adapters, out = setting.work / "7b-adapters", setting.work / "7b-merged"
    if not (adapters / "healing.json").is_file():
        recipe = replace(recipe_of(setting), steps=2, warmup_steps=0)
        texts = setting.texts(32, recipe.max_length or 2048)
        sh.heal(setting.cut("7b"), texts, adapters, recipe=recipe, progress=False)
    found = {}

    def work():
        found["done"] = sh.merge(adapters, out, overwrite=True)

    with setting.peak() as memory:
        taken = setting.seconds(work)
    adapted, same, largest = _compare_sums(setting.cut("7b"), adapters, out, setting.device)
    assert same > 0.999, f"only {same:.4f} of the merged weights are the rounded sums"
    return {
        "seconds": taken,
        "adapted": adapted,
        "share_of_same_bits": same,
        "max_difference_from_sum": largest,
        "difference_of_logits": found["done"].merge.difference,
        "memory": memory,
    }


def _compare_sums(cut, adapters, merged, device):
    """How many weights are adapted, the share with the bits of the sum, and the largest error.

    Raises AssertionError for a weight without an adapter that has changed.
    """
    lora = load_file(adapters / "adapter_model.safetensors", device=str(device))
    config = json.loads((adapters / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    stored = {name: file for file in sorted(merged.glob("*.safetensors")) for name in _names(file)}
    same, count, largest, adapted = 0, 0, 0.0, 0
    for file in sorted(cut.glob("*.safetensors")):
        with safe_open(file, "pt", device=str(device)) as weights:
            for name in weights.keys():  # noqa: SIM118
                weight = weights.get_tensor(name)
                with safe_open(stored[name], "pt", device=str(device)) as opened:
                    got = opened.get_tensor(name)
                part = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                if f"{part}A.weight" not in lora:
                    assert torch.equal(weight, got), f"{name} has changed"
                    continue
                product = lora[f"{part}B.weight"].float() @ lora[f"{part}A.weight"].float()
                expected = (weight.float() + scale * product).to(weight.dtype)
                adapted += 1
                same += int((expected == got).sum())
                count += got.numel()
                largest = max(largest, float((expected.float() - got.float()).abs().max()))
    assert 2 * adapted == len(lora), "some adapters were not found"
    return adapted, same / count, largest


def _names(file):
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def several(setting):
    """A healing with merge by torchrun, a process on each GPU with a share, or two on the CPU."""
    ranks = torch.cuda.device_count() if setting.cuda else 2
    ranks = max(n for n in (1, 2, 4, 8, 16) if n <= ranks)  # they share 16 sequences
    out = setting.work / "several"
    held_out = setting.text_file("held-out", setting.texts(8, 64))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*_heal_command(setting, *launch), "--steps", "6", "--eval-every", "3"]
    command += ["--eval-texts", str(held_out), "--merge", "--overwrite", "--out", str(out)]
    taken = setting.seconds(_call, command)
    record = json.loads((out / "healing.json").read_text())
    assert (out / "config.json").is_file()
    assert record["merge"]["difference"] <= record["merge"]["tolerance"]
    losses = [measured["nats"] for measured in record["held_out"]]
    assert all(map(math.isfinite, losses))
    return {
        "ranks": ranks,
        "seconds": taken,
        "held_out": losses,
        "tokens_per_second": record["tokens_per_second"],
        "difference_of_logits": record["merge"]["difference"],
    }


def _heal_command(setting, *launch):
    name, tokens = setting.healable(), setting.pick(256, 32)
    texts = setting.text_file("training", setting.texts(64, tokens))
    return [
        sys.executable, *launch, "-m", "shallower", "heal", str(setting.cut(name)),
        "--texts", str(texts), "--dtype", setting.plain, "--max-length", str(tokens),
        "--rank", "4", "--learning-rate", "0.002",
    ]  # fmt: skip


def _call(command):
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout + done.stderr)[-2000:]
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {said}"
