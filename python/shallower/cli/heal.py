"""``shallower heal`` and ``shallower merge``."""

from pathlib import Path
from typing import Annotated

import typer

from ..reporting.tables import healing_table
from ..storage import check_free
from ..texts.sources import Texts
from ..values.healing import Healing
from ..values.recipe import HealingDtype, Recipe
from .options import DryRun, Json, Out, Overwrite, Samples, TextsSource, TrustRemoteCode, quiet
from .output import print_json, say_dry_run, show


def heal_command(
    model: Annotated[str, typer.Argument(help="A cut: a folder or hub id with its plan.")],
    texts: TextsSource,
    out: Out,
    eval_texts: Annotated[
        str | None, typer.Option(help="Held-out texts, as --texts; the best step is kept.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="auto, by family and size, or a name in the paper's table.")
    ] = "auto",
    steps: Annotated[int, typer.Option(help="Of 16 sequences each.")] = 5000,
    rank: Annotated[int | None, typer.Option(help="Of the adapters; alpha is the same.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a sequence at most.")] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="100, or a tenth of the steps if that is less.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Before the adapters.")] = 0.05,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences in one forward; accumulated to 16 in any case.")
    ] = None,
    dtype: Annotated[HealingDtype, typer.Option(help="Of the frozen weights.")] = "nf4",
    packing: Annotated[
        bool, typer.Option(help="Join documents into full sequences, or truncate each to one.")
    ] = True,
    attention: Annotated[bool, typer.Option("--attention", help="Adapt it, too.")] = False,
    original: Annotated[
        str | None, typer.Option(help="The uncut model: measured, and the teacher of --distill.")
    ] = None,
    distill: Annotated[
        float, typer.Option(help="Weight of matching the uncut model's state at the cut.")
    ] = 0.0,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between measurements and checkpoints.")
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option(help="Use the first so many held-out texts.", min=1)
    ] = None,
    samples: Samples = None,
    seed: Annotated[int, typer.Option(help="Of order, adapters and dropout.")] = 0,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Activations in the backward pass: less memory.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold the adapters into the unquantised weights.")
    ] = False,
    from_patch: Annotated[
        bool, typer.Option("--from-patch", help="Patch the cut first; needs --original.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Heal a cut by training low-rank adapters; when interrupted, the same command goes on.

    On several devices by accelerate launch -m shallower heal … or torchrun -m shallower heal ….
    """
    check_free(out, overwrite)
    source = Texts(texts, samples)
    held_out = Texts(eval_texts, eval_samples) if eval_texts is not None else None
    quiet()
    from ..healing.heal import heal, read_plan, resolve
    from ..processes import is_main_process

    recipe = Recipe(
        preset, steps, rank, learning_rate, max_length, warmup_steps, dropout, batch_size, dtype,
        packing, attention, distill, eval_every, seed, recompute,
    )  # fmt: skip
    resolved = resolve(model, read_plan(model), recipe, trust_remote_code)
    said = (
        f"preset {resolved.preset}: rank {resolved.rank}, peak rate {resolved.learning_rate:g}, "
        f"{resolved.steps} steps of 16 sequences of {resolved.max_length} tokens"
    )
    if dry_run:
        say_dry_run({"heal": model, **resolved.to_json(), "write": [str(out)]}, as_json)
        return
    if is_main_process() and not as_json:
        show(said)
    done = heal(
        model, source, out, recipe, held_out, original, merge, from_patch, overwrite,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if is_main_process():
        say_healing(done, out, as_json)


def merge_command(
    adapters: Annotated[Path, typer.Argument(help="The folder that heal left.")],
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="The cut; by default where it was when it was healed.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fold the adapters of heal into the unquantised weights of the cut, and check the result."""
    check_free(out, overwrite)
    healing = Healing.load(adapters)
    if dry_run:
        described = {"merge": str(adapters), "model": str(healing.model), "write": [str(out)]}
        say_dry_run(described, as_json)
        return
    quiet()
    from ..healing.heal import merge

    say_healing(merge(adapters, out, model, overwrite, trust_remote_code), out, as_json)


def say_healing(healing: Healing, out: Path, as_json: bool) -> None:
    """Show what a healing bought."""
    if as_json:
        print_json({**healing.to_json(), "written": str(out)})
        return
    lines = []
    if healing.tokens_per_second:
        lines.append(f"{healing.tokens_per_second:,.0f} tokens a second")
    if merged := healing.merge:
        lines.append(
            f"merged into {merged.dtype}: logits differ by {merged.difference:.2g} of their norm, "
            f"{merged.max_difference:.2g} at most"
        )
        if merged.trained_difference is not None:
            lines.append(
                f"from the adapters on {healing.recipe.dtype}, as trained, they differ by "
                f"{merged.trained_difference:.2g} of their norm"
            )
        if merged.loss:
            lines.append(f"held-out loss, merged: {merged.loss}")
    show(healing_table(healing), *lines, f"wrote {out}")
