"""The scan against the oracle, the bare forward, and PruneMe's way of doing it."""

import numpy as np
import torch

import shallower as sh
from tests import reference

from .setting import spread

TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-4, "nf4": 1e-4}
"""Of mean angular distances. The same forwards in the same batches give the same states, up to
kernels that choose another order of sums."""


def scan_against_forward(setting):
    """A scan against the float64 oracle, then in turns with the bare forward on the same texts."""
    found = {}
    for shape in ("1b", "7b"):
        for dtype in (setting.plain, "nf4"):
            model = setting.load(shape, dtype)
            found[f"{shape} {dtype}"] = _compare(setting, model, shape, dtype)
            del model
            setting.forget()
    return found


def _compare(setting, model, shape, dtype):
    max_length = setting.pick(256, 16)
    texts = setting.texts(setting.pick({"1b": 512, "7b": 128}[shape], 8), max_length)
    few = texts[: setting.pick(32, 4)]
    difference = _from_the_oracle(setting, model, few, setting.pick(8, 2), max_length)
    assert difference < TOLERANCE[dtype], f"the scan is off the oracle by {difference:.2g}"
    size, tried = _best_batch(setting, model, texts, max_length)
    work = setting, model, texts, size, max_length
    with setting.peak() as of_forward:
        _forward(*work)
    with setting.peak() as of_scan:
        _scan(*work)
    pairs = [
        (setting.seconds(_forward, *work), setting.seconds(_scan, *work))
        for _ in range(setting.pick(5, 2))
    ]
    return {
        "batch_size": size,
        "num_texts": len(texts),
        "max_length": max_length,
        "oracle_difference": difference,
        "tokens_per_second_of_batch_sizes": tried,
        "bare_s": spread([bare for bare, _ in pairs]),
        "scan_s": spread([scan for _, scan in pairs]),
        "throughput_ratio": spread([bare / scan for bare, scan in pairs]),
        "memory": of_scan,
        "planned": setting.planned(
            setting.stored(shape), "scan", dtype=dtype, max_length=max_length, batch_size=size
        ),
        "memory_of_bare_forward": of_forward,
    }


def _scan(setting, model, texts, size, max_length):
    return sh.scan(
        model, setting.tokenizer, texts, max_length=max_length, batch_size=size, progress=False
    )


@torch.inference_mode()
def _forward(setting, model, texts, size, max_length):
    for batch in setting.batches(texts, size=size, max_length=max_length):
        model.model(**batch, use_cache=False)


def _best_batch(setting, model, texts, max_length):
    """The batch size of the fastest bare forward, and the speeds of all."""
    speeds = {}
    for size in setting.pick((8, 16, 32, 64), (2, 4)):
        try:
            _forward(setting, model, texts[:size], size, max_length)
            taken = setting.seconds(_forward, setting, model, texts, size, max_length)
        except torch.OutOfMemoryError:
            break
        speeds[size] = len(texts) * max_length / taken
    return max(speeds, key=speeds.get), speeds


@torch.inference_mode()
def _from_the_oracle(setting, model, texts, size, max_length):
    """The greatest difference of mean distances; the oracle's states are those of transformers."""
    kept, states = [], []
    handle = model.model.layers[-1].register_forward_hook(
        lambda _module, _args, output: kept.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    for batch in setting.batches(texts, size=size, max_length=max_length):
        hidden = model.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        every = [*hidden[:-1], kept.pop()]  # the last of hidden_states is behind the final norm
        states.append(torch.stack([state[:, -1] for state in every], 1).double().cpu().numpy())
    handle.remove()
    expected, _ = reference.mean_and_stderr(np.concatenate(states), "angular")
    got = _scan(setting, model, texts, size, max_length).mean("angular")
    return float(np.abs(got - expected).max())


def pruneme(setting):
    """PruneMe's way: output_hidden_states, distances in half precision, one n a run."""
    found = {}
    for shape in ("1b", "7b"):
        model = setting.load(shape, setting.plain)
        found[f"{shape} {setting.plain}"] = _against_pruneme(setting, model)
        del model
        setting.forget()
    return found


def _against_pruneme(setting, model):
    max_length, size = setting.pick(256, 16), setting.pick(16, 2)
    texts = setting.texts(setting.pick(128, 4), max_length)
    num_layers = model.config.num_hidden_layers
    n = num_layers // 4
    work = setting, model, texts, size, max_length
    mean = _scan(*work).mean("angular")
    ours = np.array([mean[start, start + n] for start in range(num_layers + 1 - n)])
    with setting.peak() as memory:
        off = np.abs(_angular(*work, n) - ours)
    inner = float(off[:-1].max())  # the last of their states is behind the final norm
    assert inner < 0.05, f"PruneMe's distances are off by {inner:.2g}"
    pairs = [
        (setting.seconds(_angular, *work, n), setting.seconds(_scan, *work))
        for _ in range(setting.pick(3, 2))
    ]
    return {
        "batch_size": size,
        "num_texts": len(texts),
        "max_length": max_length,
        "difference_of_distances": inner,
        "difference_at_the_last_state": float(off[-1]),
        "one_n_s": spread([theirs for theirs, _ in pairs]),
        "scan_s": spread([scan for _, scan in pairs]),
        "one_n_over_scan": spread([theirs / scan for theirs, scan in pairs]),
        "runs_for_all_n": num_layers - 1,
        "memory": memory,
    }


def streamed(setting):
    """A scan and a loss of a 7B whose layers come from disk, against those of it on the device."""
    max_length, size = setting.pick(256, 16), setting.pick(16, 2)
    texts = setting.texts(setting.pick(256, 8), max_length)
    found, work = {}, (texts, size, max_length)
    for way, place in (("plain", str(setting.device)), ("streamed", "stream")):
        model, _ = sh.load_model(setting.stored("7b"), setting.plain, place, progress=False)
        found[way] = _with_memory(setting, model, *work)
        layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
        del model
        setting.forget()
    plain, layers = found["plain"], found["streamed"]
    difference = float(np.abs(plain.pop("mean") - layers.pop("mean")).max())
    assert difference < TOLERANCE[setting.plain], f"streaming is off by {difference:.2g}"
    nats = abs(plain["nats"] - layers["nats"])
    assert nats < TOLERANCE[setting.plain], f"the streamed loss is off by {nats:.2g}"
    more = layers["memory"]["above_bytes"] - plain["memory"]["above_bytes"]
    if setting.cuda:
        assert more < 3 * layer, f"streaming holds {more:,} bytes more, and a layer has {layer:,}"
    return {
        "batch_size": size,
        "num_texts": len(texts),
        "max_length": max_length,
        "layer_bytes": layer,
        "difference_of_distances": difference,
        "difference_of_losses": nats,
        **found,
    }


def _with_memory(setting, model, texts, size, max_length):
    """A scan's mean distances and seconds, all but the first of them, its memory, and the loss."""
    work = setting, model, texts, size, max_length
    with setting.peak() as memory:
        mean = _scan(*work).mean("angular")
    loss = sh.evaluate_loss(
        model, setting.tokenizer, texts, max_length=max_length, batch_size=size, progress=False
    )
    seconds = [setting.seconds(_scan, *work) for _ in range(setting.pick(3, 2))]
    return {"mean": mean, "nats": loss.nats, "scan_s": spread(seconds), "memory": memory}


@torch.inference_mode()
def _angular(setting, model, texts, size, max_length, n):
    """(L+1-n,) mean distances, as compute_block_similarity of PruneMe computes them."""
    found = []
    for batch in setting.batches(texts, size=size, max_length=max_length):
        hidden = model(**batch, output_hidden_states=True).hidden_states
        last = [state[:, -1].to(torch.bfloat16) for state in hidden]
        cosines = [
            torch.cosine_similarity(one, other, dim=-1)
            for one, other in zip(last, last[n:], strict=False)
        ]
        found.append(torch.acos(torch.stack(cosines).clamp(-1, 1)) / torch.pi)
    return torch.cat(found, 1).float().mean(1).cpu().numpy()
