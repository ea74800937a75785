"""A patch in closed form, and the loss of a large vocabulary."""

import torch

import shallower as sh

from .setting import spread


def patch(setting):
    """A patch of a 7B-shaped model: its time and its memory.

    What a random model loses by a cut need not come back: the patch may be refused in the end, on
    held-out text, when all has been computed. That it heals is asserted of SmolLM2, in (e).
    """
    model = setting.load("7b", setting.plain)
    num_tokens = setting.pick(131_072, 4_096)
    max_length = setting.pick(256, 64)
    texts = setting.texts(num_tokens * 5 // (4 * max_length), max_length)
    outcome = {}

    def work():
        try:
            done = sh.patch(
                model, setting.tokenizer, [setting.block("7b")], texts=texts,
                max_length=max_length, num_tokens=num_tokens, progress=False,
            )  # fmt: skip
            outcome.update(patched=True, loss=done.patched, loss_of_cut=done.cut)
        except sh.PatchError as error:
            outcome.update(patched=False, refused=str(error))

    with setting.peak() as memory:
        taken = setting.seconds(work)
    return {
        "shape": "7b",
        "num_tokens": num_tokens,
        "layers_dropped": len(setting.block("7b")),
        "outcome": outcome,
        "seconds": taken,
        "memory": memory,
        "planned": setting.planned(
            setting.stored("7b"), "patch", dtype=setting.plain, max_length=max_length
        ),
    }


def loss(setting):
    """The loss at a vocabulary of 262,144: its memory above the model, and that it is right."""
    vocabulary, size = setting.pick(262_144, 65_536), setting.pick(8, 4)
    max_length = setting.pick(4096, 64)
    config = setting.config("1b", vocab_size=vocabulary, num_hidden_layers=4, hidden_size=1024)
    if setting.miniature:
        config = setting.config("1b", vocab_size=vocabulary)
    model = setting.random_model(config)
    texts = setting.texts(size, max_length)

    def measure():
        return sh.evaluate_loss(
            model, setting.tokenizer, texts, max_length=max_length, batch_size=size,
            progress=False,
        )  # fmt: skip

    difference = abs(measure().nats - _nats(setting, model, texts, max_length))
    assert difference < setting.pick(2e-3, 1e-5), f"the loss is off by {difference:.2g}"
    with setting.peak() as memory:
        measured = measure()
    repeats = [setting.seconds(measure) for _ in range(setting.pick(3, 2))]
    logits = size * max_length * vocabulary * (2 if setting.cuda else 4)
    return {
        "vocabulary": vocabulary,
        "batch_size": size,
        "max_length": max_length,
        "nats": measured.nats,
        "difference": difference,
        "seconds": spread(repeats),
        "tokens_per_second": measured.num_tokens / min(repeats),
        "bytes_of_all_logits": logits,
        "memory": memory,
        "planned": setting.planned(
            config, "eval", dtype=setting.plain, max_length=max_length, batch_size=size
        ),
    }


@torch.inference_mode()
def _nats(setting, model, texts, max_length):
    """Nats a token, of a few logits at a time, added up in float64."""
    total, count = 0.0, 0
    for batch in setting.batches(texts, size=1, max_length=max_length):
        states = model.model(**batch, use_cache=False).last_hidden_state[0, :-1]
        for rows, labels in zip(
            states.split(256), batch["input_ids"][0, 1:].split(256), strict=True
        ):
            scores = model.lm_head(rows).float()
            total += float(torch.nn.functional.cross_entropy(scores, labels, reduction="sum"))
            count += len(labels)
    return total / count
