"""What the steps share: the device, models of random weights, texts, clocks and memory."""

import gc
import json
import re
import shutil
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import shallower as sh
from shallower.studies import demo

VOCABULARY = 49_152
"""That of SmolLM2, whose tokenizer there is without a network."""

SHAPES = {
    # Llama-3.2-1B and Llama-2-7B, but for the vocabulary.
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
}
MINIATURES = {"1b": (64, 128, 4, 4, 2), "7b": (128, 256, 6, 4, 4)}
DROPPED = {"1b": (9, 13), "7b": (21, 29)}
DROPPED_MINIATURES = {"1b": (2, 3), "7b": (3, 5)}


@dataclass
class Setting:
    """Where the steps run, and how large.

    Attributes:
        work: a folder for models, which the steps share.
        miniature: tiny shapes and few steps, for the CPU.
    """

    work: Path
    miniature: bool

    @property
    def device(self):
        return torch.device("cpu" if self.miniature or not torch.cuda.is_available() else "cuda:0")

    @property
    def cuda(self):
        return self.device.type == "cuda"

    @property
    def plain(self):
        """The dtype of weights that are not quantised."""
        return "bfloat16" if self.cuda else "float32"

    def pick(self, whole, miniature):
        """A size: the one for a GPU, or the one for a test of this script."""
        return miniature if self.miniature else whole

    # Models and texts.
    @cached_property
    def tokenizer(self):
        folder = self.work / "tokenizer"
        if not folder.is_dir():
            path = demo.model_path()
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            with self._once(folder) as new:
                tokenizer.save_pretrained(new)
        return AutoTokenizer.from_pretrained(folder)

    def config(self, shape, **more):
        hidden, inner, layers, heads, kv_heads = self.pick(SHAPES, MINIATURES)[shape]
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return LlamaConfig(**{**sizes, **more}, dtype=self.plain)

    def random_model(self, config):
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.plain))
        return model.eval().requires_grad_(False)

    def stored(self, shape):
        """The folder of a random model, or of SmolLM2."""
        folder = self.work / shape
        if not folder.is_dir():
            if shape == "smol":
                model, tokenizer = sh.load_model(demo.model_path(), self.plain, str(self.device))
            else:
                model, tokenizer = self.random_model(self.config(shape)), self.tokenizer
            with self._once(folder) as new:
                sh.save_model(model, tokenizer, new)
            del model
            self.forget()
        return folder

    def block(self, shape):
        """The layers that are dropped: of 1B and 7B those that the paper's recipe would."""
        return sh.Block(*self.pick(DROPPED, DROPPED_MINIATURES)[shape])

    def cut(self, shape):
        """The folder of the same without some layers, cut on disk."""
        whole, folder = self.stored(shape), self.work / f"{shape}-cut"
        if not folder.is_dir():
            block = sh.Block(12, 16) if shape == "smol" else self.block(shape)
            sh.prune(whole, [block], folder)
        return folder

    def healable(self):
        """The name of a model that a test heals in seconds on the device."""
        return self.pick("smol", "1b")

    def load(self, shape, dtype):
        model, _ = sh.load_model(self.stored(shape), dtype, str(self.device))
        return model

    def texts(self, count, tokens):
        """Different texts of Python's documentation, each of that many tokens at least."""
        whole = "\n\n".join(topics[name] for name in sorted(topics))
        whole = re.sub(r"[ \t]+", " ", whole) * 2
        length, stride = 12 * tokens, max(1, len(whole) // 2 // count)
        return [whole[start * stride : start * stride + length] for start in range(count)]

    def text_file(self, name, texts):
        path = self.work / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    def batches(self, texts, *, size, max_length):
        """Token ids on the device, by the tokenizer alone; all texts have as many tokens."""
        for start in range(0, len(texts), size):
            encoded = self.tokenizer(
                texts[start : start + size], truncation=True, max_length=max_length,
                return_tensors="pt",
            )  # fmt: skip
            yield {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    @contextmanager
    def _once(self, folder):
        """A folder that is there when it is complete."""
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        yield new
        new.rename(folder)

    # Clocks and memory.
    def planned(self, model, what, **options):
        """The memory that a stage is planned to take, by the config or folder of its model."""
        forecast = getattr(sh, "memory_forecast", None)  # versions before it have no plan
        return forecast and forecast(model, what, **options).to_json()

    def seconds(self, work, *arguments):
        """The time that a call takes, to the end of what it has asked the GPU for."""
        self.wait()
        start = time.perf_counter()
        work(*arguments)
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        """Wait for what the GPU was asked for."""
        if self.cuda:
            torch.cuda.synchronize()

    def forget(self):
        """Free what nobody holds."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    @contextmanager
    def peak(self):
        """The memory of the body, in a dictionary that is filled at its end."""
        self.forget()
        memory = {"measured": "torch.cuda.max_memory_allocated" if self.cuda else "VmHWM"}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            memory["before_bytes"] = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            memory["before_bytes"] = _resident("VmRSS")
        yield memory
        peak = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        memory["peak_bytes"] = peak
        memory["above_bytes"] = peak - memory["before_bytes"]


def _resident(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def spread(values):
    """Repeats of a measurement, with their median."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }
