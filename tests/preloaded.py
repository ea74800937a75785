"""What commands import first of all, and nothing that starts a thread: see ``tests.forks``."""

import gc

import matplotlib.backends.backend_agg
import matplotlib.figure
import peft
import PIL.Image
import pydantic
import scipy.stats
import torch
import transformers.models.llama.modeling_llama
import typer.main

from shallower.cli import compare, heal, prune, run, scan
from shallower.healing import heal as healing
from shallower.judgement import verifying
from shallower.patching import patch
from shallower.reporting import report

__all__ = [
    "PIL", "compare", "heal", "healing", "matplotlib", "patch", "peft", "prune",
    "pydantic", "report", "run", "scan", "scipy", "transformers", "typer", "verifying",
]  # fmt: skip

PIL.Image.init()
torch.set_num_threads(1)
gc.freeze()
