"""The document of families, generated from what the tests say."""

from pathlib import Path

from shallower.models.layer_config import shorten
from tests.families import (
    DROP_SETS,
    EXPERTS_STAY,
    MIXTURES,
    NUM_LAYERS,
    REFUSED,
    UNTESTED,
    WHOLE,
    WHOLE_REFUSED,
    families,
    small_config,
)

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "families.md"


def table() -> str:
    """The document of families, generated."""
    lines = [
        "# Families",
        "",
        f"Generated from `tests/families.py` by `make families`. Each family is built small, with "
        f"{NUM_LAYERS} random layers, and cut by {len(DROP_SETS)} sets of layers: "
        + "; ".join(f"{title} {_listed(layers)}" for title, layers in DROP_SETS.items())
        + ". `tests/cutting/test_families.py` saves each cut, reloads it with stock transformers, "
        "and compares its logits with those of a forward that skips the layers, and its generation "
        "with a cache to that without. What no config of the family can express is refused before "
        "anything changes, with the nearest layers that could go.",
        "",
        f"{len(families())} families and variants:",
        "",
        "| family | what its config says by layer | refused, and what stands in the way |",
        "|---|---|---|",
    ]
    for name in families():
        refused = REFUSED.get(name, {})
        reasons: dict[str, list[str]] = {}
        for title, reason in refused.items():
            reasons.setdefault(reason, []).append(title)
        said = "; ".join(
            f"{'all' if len(titles) == len(DROP_SETS) else ', '.join(titles)}: {reason}"
            for reason, titles in reasons.items()
        )
        lines.append(f"| {name} | {', '.join(_by_layer(name))} | {said} |")
    lines += [
        "",
        "## Experts",
        "",
        f"Routed experts can go of {len(MIXTURES)} families and variants. "
        "`tests/cutting/test_experts.py` cuts two of six of every layer that has any, saves and "
        "reloads the cut, and compares its logits, and its generation, with those of the whole "
        "model in which the same experts cannot be chosen; `tests/cutting/test_checkpoint.py` "
        "does so on disk.",
        "",
        "; ".join(MIXTURES) + ".",
        "",
        "Those whose experts stay, each refused in a sentence before anything changes:",
        "",
        "| family | what stands in the way |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in EXPERTS_STAY.items()),
    ]
    lines += [
        "",
        "## More than text",
        "",
        f"{len(WHOLE)} types of images and sound have no causal class of their own. They are "
        "opened by their stock class, and their text decoder is cut. "
        "`tests/cutting/test_towers.py` cuts each on disk and in memory, reloads it with stock "
        "transformers, and compares its logits of text with those of a forward that skips the "
        "layer.",
        "",
        "; ".join(WHOLE) + ".",
        "",
        "Those that are refused in a sentence before anything changes:",
        "",
        "| type | what stands in the way |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in sorted(WHOLE_REFUSED.items())),
        "",
        "Other types of this kind are not tested.",
    ]
    lines += ["", "Not tested:", "", "| model type | why |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in sorted(UNTESTED.items())]
    return "\n".join(lines) + "\n"


def _listed(layers: tuple[int, ...]) -> str:
    return "{" + ", ".join(map(str, layers)) + "}"


def _by_layer(name: str) -> list[str]:
    """The keys that cuts change, beside the counts of layers."""
    counts = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks"}
    counts |= {"decoder_layers", "num_decoder_layers", "encoder_layers", "num_encoder_layers"}
    changed: set[str] = set()
    for dropped in DROP_SETS.values():
        config = small_config(name).get_text_config(decoder=True)
        before = config.to_dict()
        try:
            shorten(config, NUM_LAYERS, [i for i in range(NUM_LAYERS) if i not in dropped])
        except ValueError:
            continue
        changed |= {key for key, value in config.to_dict().items() if before.get(key) != value}
    return sorted(changed - counts)


if __name__ == "__main__":
    DOCUMENT.write_text(table(), encoding="utf-8")
