"""The names of the files that the stages leave, so that one finds what another wrote."""

PLAN_FILE = "shallower_plan.json"
"""The name of the plan beside the checkpoint that it made."""

PATCH_FILE = "shallower_patch.json"
HEALING_FILE = "healing.json"
HEALING_FIGURE = "healing.png"
"""Records of a patch and of a healing, beside the model that they made."""

SCAN_FILE = "scan.safetensors"
PARTIAL_FILE = "scan.partial.safetensors"
RESULTS_FILE = "results.json"
CHECKPOINT_FOLDER = "checkpoint"
CHECKPOINT_GGUF = f"{CHECKPOINT_FOLDER}/{CHECKPOINT_FOLDER}.gguf"
"""The recommended cut of a run, a folder; and the file in it, if that is a GGUF file."""

EVAL_FILE = "eval.json"
"""What ``eval --json`` prints."""

GAIN_FILE = "gain.json"
"""What the recommended cut saves, as counted and as forecast for one GPU."""

HEALED_FOLDER = "healed"
"""The healed model below the folder of a run."""

COMPARISON_FILE = "comparison.json"
COMPARISON_TABLE = "comparison.csv"
"""A comparison of criteria and its table."""

SMALL = 1 << 21
"""Bytes of results, figures and a page, about."""

REPORT_FILE = "report.html"
"""The page of results; beside it lie ``report.md`` and ``report.json``."""

HEAT_MAP_FILE = "heat_map.png"
"""The map of a scan."""

_OF_MODELS = (PLAN_FILE, PATCH_FILE, HEALING_FILE, HEALING_FIGURE, EVAL_FILE, GAIN_FILE)
_OF_STUDIES = (COMPARISON_FILE, COMPARISON_TABLE, RESULTS_FILE)
_PAGES = (HEAT_MAP_FILE, REPORT_FILE, "report.md", "report.json")
OF_ONE_MODEL = frozenset((*_OF_MODELS, *_OF_STUDIES, *_PAGES))
"""Files about one model, and about none that is made from it."""
