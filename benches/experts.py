"""Criteria of experts against all sets, on a mixture that is trained here with useless experts.

    python benches/experts.py [--steps 600] [--texts c4.jsonl] [--other wikipedia.jsonl]
        [--eval-texts c4_eval.jsonl] [--json FILE]

A small Qwen3-MoE of four layers, of which one has 8 experts, 2 for a token, learns C4 in a few
minutes; experts 5, 6 and 7 stay as they were drawn, so that nothing is learned in them. Then every
criterion drops 3 experts by statistics on each of two calibration texts, and all C(8, 3) = 56 sets
are measured on texts that report. A regret is what a choice loses more than the best of these, with
its error, paired by text. Asserted first: the rows' losses are those of the sets.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

import shallower as sh
from patches import read_texts
from shallower.savings.timing import title_of
from shallower.values.experts import DroppedExperts
from shallower.values.provenance import versions

SPARSE, EXPERTS, USELESS, GO = 2, 8, (5, 6, 7), 3
LENGTH, ROWS = 128, 16


def tokenizer_of(texts):
    """A BPE of 512 tokens, learned from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def config_of(tokenizer, sparse=(SPARSE,), experts=EXPERTS, aux=0.0):
    """Four layers, of which those that are ``sparse`` have experts, 2 for a token."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=experts,
        num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
        mlp_only_layers=[layer for layer in range(4) if layer not in sparse],
        router_aux_loss_coef=aux, output_router_logits=aux > 0, tie_word_embeddings=True,
        max_position_embeddings=512, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def trained(config, tokenizer, texts, *, steps, useless=USELESS, seed=0):
    """The mixture, and the mean of its last losses; ``useless`` experts stay as drawn."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    sparse = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    weights = [weight for mlp in sparse for weight in mlp.experts.parameters()]
    drawn = [weight.detach().clone() for weight in weights]
    ids = torch.tensor([one for text in texts for one in [*tokenizer(text)["input_ids"], 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - LENGTH, (ROWS,), generator=generator)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for weight, before in zip(weights, drawn, strict=True):
                weight[list(useless)] = before[list(useless)]
        losses.append(float(loss.detach()))
    model.config.output_router_logits = False  # which only the balance takes
    return model.eval(), sum(losses[-20:]) / len(losses[-20:])


def of_all_sets(model, tokenizer, texts):
    """The loss without each set of experts, by its words."""
    found = {}
    for gone in itertools.combinations(range(EXPERTS), GO):
        dropped = DroppedExperts(EXPERTS, {SPARSE: gone})
        with sh.without_layers(model, sh.Plan(4, (), experts=dropped)):
            found[str(dropped)] = sh.evaluate_loss(model, tokenizer, texts, progress=False)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--texts", type=Path, default=data / "text" / "c4.jsonl")
    parser.add_argument("--other", type=Path, default=data / "text" / "wikipedia.jsonl")
    parser.add_argument("--eval-texts", type=Path, default=data / "text" / "c4_eval.jsonl")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    texts, reports = read_texts(options.texts), read_texts(options.eval_texts)
    fitting, learning, other = texts[:80], texts[80:], read_texts(options.other)[:80]
    tokenizer, started = tokenizer_of(learning), time.perf_counter()
    model, loss = trained(config_of(tokenizer), tokenizer, learning, steps=options.steps)
    print(
        f"{options.steps} steps, {time.perf_counter() - started:.0f} s, loss {loss:.3f}",
        file=sys.stderr,
    )
    done = sh.compare(
        model, tokenizer, {"c4": fitting, "wikipedia": other}, reports, n=[GO], unit="experts",
        cache=False, max_eval_texts=len(reports),
    )  # fmt: skip
    sets = of_all_sets(model, tokenizer, reports)
    best = min(sets, key=lambda name: sets[name].nats)
    order = sorted(one.nats for one in sets.values())
    rows = []
    for row in done.rows:
        if row.experts is None:
            continue
        own = sets[row.experts]
        assert abs(own.nats - row.standing.loss.mean) < 1e-4, (row, own)
        less = own.minus(sets[best])
        rows.append(
            {
                "texts": row.texts, "criterion": row.criterion, "experts": row.experts,
                "loss": own.nats, "regret": less.mean, "stderr": less.stderr,
                "rank": order.index(own.nats) + 1,
            }
        )  # fmt: skip
        print(
            f"{row.texts:<9} {row.criterion:<15} {row.experts:<8} {own.nats:.4f} regret "
            f"{less.mean:.4f} ± {less.stderr:.4f}, {rows[-1]['rank']} of {len(order)}",
            flush=True,
        )
    whole = done.models[0].whole
    print(f"whole {whole.nats:.4f}, best {best} {order[0]:.4f}, worst {order[-1]:.4f}")
    if options.json:
        record = {
            "command": " ".join(["python", "benches/experts.py", *sys.argv[1:]]),
            "machine": title_of(model.device), "versions": versions(), "training_loss": loss,
            "whole": whole.nats, "best": best, "worst": order[-1], "useless": list(USELESS),
            "skipped": dict(done.skipped), "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
