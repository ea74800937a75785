"""Every criterion once more, slowly: plain NumPy in float64, on states that plain hooks took."""

import numpy as np
import torch


def hooked_states(model, layers, batches):
    """For every text, in the order of its number: (L+1, T, D) float64 states of its tokens."""
    taken = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: taken.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in layers
    ]
    handles.append(
        layers[-1].register_forward_hook(
            lambda _module, _args, out: taken.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    found = {}
    for batch in batches:
        taken.clear()
        with torch.no_grad():
            model(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
            )
        states = torch.stack(taken).double().numpy()
        for row, text in enumerate(batch.samples):
            found[int(text)] = states[:, row, batch.attention_mask[row] == 1]
    for handle in handles:
        handle.remove()
    return [found[text] for text in sorted(found)]


def blocks(num_layers, cost):
    """A cost for every block, (L+1, L+1), zero elsewhere."""
    matrix = np.zeros((num_layers + 1, num_layers + 1))
    for start in range(num_layers):
        for stop in range(start + 1, num_layers + 1):
            matrix[start, stop] = cost(start, stop)
    return matrix


def cosine_of(x, y):
    return (x @ y) / (np.linalg.norm(x) * np.linalg.norm(y))


def angle_of(x, y):
    """By the chord, which keeps its digits where the angle is small."""
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return 2 * np.arctan2(np.linalg.norm(x - y), np.linalg.norm(x + y)) / np.pi


def at_last_tokens(states, measure):
    """The mean over texts of a measure of both ends of a block, at the last token."""
    return blocks(
        len(states[0]) - 1,
        lambda start, stop: np.mean([measure(x[start, -1], x[stop, -1]) for x in states]),
    )


def angular(states):
    return at_last_tokens(states, angle_of)


def cosine(states):
    return at_last_tokens(states, lambda x, y: 1 - cosine_of(x, y))


def relative_l2(states):
    return at_last_tokens(states, lambda x, y: np.linalg.norm(y - x) / np.linalg.norm(x))


def hsic(x, y):
    """The unbiased estimator of Song et al. (2012), eq. 5, of linear kernels."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (total - 2 * (one @ k @ m @ one) / (n - 2)) / (n * (n - 3))


def cka(minibatches):
    """Of minibatches of last tokens' states, each (B, L+1, D)."""
    size = minibatches[0].shape[1]
    sums = np.zeros((size, size))
    for states in minibatches:
        sums += [[hsic(states[:, i], states[:, j]) for j in range(size)] for i in range(size)]
    own = np.sqrt(np.diag(sums))
    return np.triu(1 - sums / np.outer(own, own), 1)


def over_all_tokens(states, measure):
    """(L,): the mean over all tokens of a measure of a layer's input and output; and its error."""
    means, errors = [], []
    for layer in range(len(states[0]) - 1):
        texts = [
            [measure(x, y) for x, y in zip(text[layer], text[layer + 1], strict=True)]
            for text in states
        ]
        count, size = sum(map(len, texts)), len(texts)
        mean = sum(map(sum, texts)) / count
        squares = sum((sum(values) - mean * len(values)) ** 2 for values in texts)
        means.append(mean)
        errors.append(np.sqrt(size / (size - 1) * squares) / count)
    return np.array(means), np.array(errors)


def block_influence(states):
    return over_all_tokens(states, lambda x, y: 1 - cosine_of(x, y))


def magnitude(states):
    return over_all_tokens(states, lambda x, y: np.linalg.norm(y - x) / np.linalg.norm(y))


def xmerge(states):
    scores = []
    for values in (block_influence(states)[0], magnitude(states)[0]):
        spread = np.sqrt(np.mean((values - values.mean()) ** 2))
        scores.append((values - values.mean()) / spread)
    return np.max(scores, axis=0)


def taylor(model, layers, batches):
    """By the gradients that autograd gives of a loss from all logits, text by text."""
    count = sum(int(batch.attention_mask.sum()) - len(batch) for batch in batches)
    weights = [[p for p in layer.parameters() if p.ndim > 1] for layer in layers]
    flat = [weight for layer in weights for weight in layer]
    sums = [np.zeros(weight.shape) for weight in flat]
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            tokens = torch.from_numpy(ids[mask == 1])
            logits = model(input_ids=tokens[None]).logits[0, :-1].double()
            loss = -logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]].sum()
            for total, part in zip(sums, torch.autograd.grad(loss / count, flat), strict=True):
                total += part.double().numpy()
    values = [
        np.abs(w.detach().double().numpy() * s).sum() for w, s in zip(flat, sums, strict=True)
    ]
    ends = np.cumsum([len(layer) for layer in weights])
    return np.array([sum(part) for part in np.split(np.array(values), ends[:-1])])


def weights(pairs):
    """Of the two matrices that every layer writes by."""
    norms = [np.sqrt(sum((w.astype(np.float64) ** 2).sum() for w in both)) for both in pairs]
    costs = []
    for layer, norm in enumerate(norms):
        beside = [norms[i] for i in (layer - 1, layer + 1) if 0 <= i < len(norms)]
        costs.append(norm / (sum(beside) / len(beside)))
    return np.array(costs)


def kept(batches, fit=4096, hold=512):
    """For every text, in batch order, the places that are fitted and those that are held out."""
    texts = [
        (int(text), int(n))
        for b in batches
        for text, n in zip(b.samples, b.attention_mask.sum(1), strict=True)
    ]
    found = []
    for held, most in ((False, fit), (True, hold)):
        all_places = [
            (text, place)
            for index, (text, length) in enumerate(texts)
            if (index % 4 == 3) == held
            for place in range(1, length)
        ]
        count = min(most, len(all_places))
        found.append(
            [
                all_places[int(np.round(i * (len(all_places) - 1) / max(1, count - 1)))]
                for i in range(count)
            ]
        )
    return found


def plain(states, places, fitted):
    """The places that carry massive activations at no state."""
    for layer in range(len(states[0])):
        bound = 10 * np.median(np.linalg.norm(at(states, layer, fitted), axis=1))
        places = [p for p in places if np.linalg.norm(states[p[0]][layer, p[1]]) <= bound]
    return places


def at(states, layer, places):
    return np.array([states[text][layer, place] for text, place in places])


def unexplained(states, batches, inputs, first=0):
    """1 - R² of every block, by normal equations; ``inputs(start)`` gives them by text."""
    fitted, held = (plain(states, places, kept(batches)[0]) for places in kept(batches))
    num_layers = len(states[0]) - 1
    costs = np.full((num_layers + 1, num_layers + 1), np.nan)
    errors = costs.copy()
    for start in range(first, num_layers):
        x, a = (np.array([inputs(start, *place) for place in places]) for places in (fitted, held))
        gram = x.T @ x
        gram += np.diag(np.diag(gram)) * x.shape[1] / len(x)
        for stop in range(start + 1, num_layers + 1):
            increment = at(states, stop, fitted) - at(states, start, fitted)
            change = np.linalg.solve(gram, x.T @ increment)
            goal = at(states, stop, held)
            missing = np.sum((goal - at(states, start, held) - a @ change) ** 2, axis=1)
            spread = np.sum((goal - at(states, stop, fitted).mean(axis=0)) ** 2, axis=1)
            texts = np.array([text for text, _ in held])
            sums = np.array(
                [[missing[texts == t].sum(), spread[texts == t].sum()] for t in np.unique(texts)]
            )
            share = sums[:, 0].sum() / sums[:, 1].sum()
            costs[start, stop] = share
            squares = np.sum((sums[:, 0] - share * sums[:, 1]) ** 2) * len(sums) / (len(sums) - 1)
            errors[start, stop] = np.sqrt(squares) / sums[:, 1].sum()
    return costs, errors


def linear_map(states, batches, first=0):
    return unexplained(
        states, batches, lambda start, text, place: states[text][start, place], first
    )


def reachable(states, batches, inputs):
    """``inputs[layer][text]``: (T, F), what the feed-forward's last matrix is given."""
    return unexplained(
        states, batches, lambda start, text, place: inputs[start - 1][text][place], first=1
    )
