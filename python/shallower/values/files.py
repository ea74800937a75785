"""The names of the files that the stages leave, so that one finds what another wrote."""

PLAN_FILE = "shallower_plan.json"
"""The name of the plan beside the checkpoint that it made."""

SCAN_FILE = "scan.safetensors"
PARTIAL_FILE = "scan.partial.safetensors"
RESULTS_FILE = "results.json"
CHECKPOINT_FOLDER = "checkpoint"

EVAL_FILE = "eval.json"
"""What ``eval --json`` prints."""

GAIN_FILE = "gain.json"
"""What the recommended cut saves, as counted and as forecast for one GPU."""

HEALED_FOLDER = "healed"
"""The healed model below the folder of a run."""

CURVE_FILE = "curve.json"
CURVE_TABLE = "curve.csv"
"""A curve over the layers that go, and its table."""

COMPARISON_FILE = "comparison.json"
COMPARISON_TABLE = "comparison.csv"
"""A comparison of criteria and its table; beside them lie its figures."""

SWEEP_FILE = "sweep.json"
"""The jobs of a sweep; what they found lies below ``jobs``."""

REPORT_FILE = "report.html"
"""The page of results; beside it lie ``report.md`` and ``report.json``."""
