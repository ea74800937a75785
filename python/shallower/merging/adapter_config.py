"""What peft writes of adapters beside their weights: their settings, and the model under them."""

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError, why

CONFIG_FILE = "adapter_config.json"

_NEVER_MADE = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "init_lora_weights": True,
}
"""Settings of peft that change more than a weight's low-rank part, and their plain values."""


def read_adapter_config(adapters: Path) -> dict[str, Any]:
    """Read peft's settings of adapters; ModelError if there are none, or for more than LoRA."""
    try:
        config = json.loads((adapters / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{adapters} holds no adapters of peft: {why(error, adapters)}") from error
    if kind != "LORA":
        raise ModelError(f"the adapters in {adapters} are {kind}: expected LORA, as heal makes")
    for name, plain in _NEVER_MADE.items():
        if config.get(name) not in (plain, None, [], {}):
            raise ModelError(
                f"the adapters in {adapters} were made with {name}={config[name]!r}, which "
                f"shallower heal never does, and cannot be merged: use peft's merge_and_unload"
            )
    return dict(config)


def remembered_base(adapters: Path) -> str:
    """Name the cut that adapters were trained for; ModelError if they name none."""
    base = read_adapter_config(adapters).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ModelError(f"the adapters in {adapters} name no model: name the cut (model, --model)")
    return base
