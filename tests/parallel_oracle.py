"""Parallel-in-time training, transcribed: Algorithms 1 to 4 of the paper by hand on a small Euler network.

x(0) = S z + c,  x(t+1) = x(t) + d tanh(K(t) x(t) + b(t)),  scores = H x(T) + e,  Phi the mean cross-entropy.
Gradients are written out (no autograd), regressions are solved on the list of all pairs, and the work is in the paper's
order: in an iteration A pulls back and updates, *then* runs forward on the next batch. A co-state here is + dPhi/dx.
"""

import torch


def weights_of(model):
    """Copies: stem, layers, head; each a pair of matrix and bias."""

    def pair(layer):
        return [layer.weight.detach().clone(), layer.bias.detach().clone()]

    return {"stem": pair(model.stem), "layers": [pair(b.linear) for b in model.blocks], "head": pair(model.head)}


def forward(delta, x, layers):
    """Algorithm 1: all states."""
    states = [x]
    for k, b in layers:
        states.append(states[-1] + delta * torch.tanh(states[-1] @ k.T + b))
    return states


def backward(delta, p, states, layers):
    """Algorithm 2, with the gradients of the weights: co-state at the first state, and one pair a layer."""
    gradients = []
    for x, (k, b) in zip(reversed(states[:-1]), reversed(layers), strict=True):
        slope = delta * p * (1 - torch.tanh(x @ k.T + b) ** 2)
        gradients.insert(0, [slope.T @ x, slope.sum(0)])
        p = p + slope @ k
    return p, gradients


def end(x, y, head):
    """Phi, its gradient in x(T), and the head's gradients."""
    scores = x @ head[0].T + head[1]
    chance = scores.softmax(1)
    loss = -chance[range(len(y)), y].log().mean()
    wrong = (chance - torch.nn.functional.one_hot(y, len(head[1]))) / len(y)
    return loss, wrong @ head[0], [wrong.T @ x, wrong.sum(0)]


def update(pairs, gradients, eta):
    """Lemma 2.2, without a regulariser."""
    for (k, b), (gk, gb) in zip(pairs, gradients, strict=True):
        k -= eta * gk
        b -= eta * gb


def regress(pairs, x, y, classes, decay, ridge, targets):
    """Eq. 6 on the list of all pairs, with the library's ridge, decay and targets."""
    if not pairs:
        return torch.zeros_like(x)

    def rows(x, y):
        side = [torch.nn.functional.one_hot(y, classes).to(x.dtype)] if targets else []
        return torch.cat([x, *side, torch.ones(len(x), 1, dtype=x.dtype)], 1)

    age = [decay ** ((len(pairs) - 1 - i) / 2) for i in range(len(pairs))]
    left = torch.cat([a * rows(x, y) for a, (x, y, _) in zip(age, pairs, strict=True)])
    right = torch.cat([a * p * len(p) for a, (_, _, p) in zip(age, pairs, strict=True)])
    small = ridge * (left**2).sum() / left.shape[1]
    left = torch.cat([left, small.sqrt() * torch.eye(left.shape[1], dtype=x.dtype)])
    right = torch.cat([right, torch.zeros(left.shape[1], right.shape[1], dtype=x.dtype)])
    return rows(x, y) @ torch.linalg.lstsq(left, right).solution / len(x)


def prolong(layers):
    """Linear interpolation of every second layer; constant after the last."""
    for t in range(1, len(layers), 2):
        for value, before, after in zip(layers[t], layers[t - 1], layers[min(t + 1, len(layers) - 1)], strict=True):
            value.copy_(before if t + 1 == len(layers) else (before + after) / 2)


def algorithm3(w, batch, delta, eta, cut, step=1):
    """One serial iteration on every ``step``-th layer; returns the loss and the pair at the cut."""
    z, y = batch
    layers = w["layers"][::step]
    states = forward(delta * step, z @ w["stem"][0].T + w["stem"][1], layers)
    loss, p, head = end(states[-1], y, w["head"])
    at = cut // step
    middle, second = backward(delta * step, p, states[at:], layers[at:])
    p, first = backward(delta * step, middle, states[: at + 1], layers[:at])
    update(layers, first + second, eta)
    update([w["head"], w["stem"]], [head, [p.T @ z, p.sum(0)]], eta)
    return loss, (states[at], y, middle)


def algorithm4(model, batches, cut, eta, delta, coarse=0, decay=1.0, ridge=1e-3, targets=False):
    """All iterations; returns losses, final weights, and mse, its share and Eq. 7's constant of each prediction."""
    w, pairs, losses, errors = weights_of(model), [], [], []
    classes = len(w["head"][1])
    for batch in batches[:coarse]:
        loss, pair = algorithm3(w, batch, delta, eta, cut, step=2)
        prolong(w["layers"])
        losses.append(loss)
        pairs.append(pair)
    a, b = w["layers"][:cut], w["layers"][cut:]

    def to_cut(batch):
        return forward(delta, batch[0] @ w["stem"][0].T + w["stem"][1], a)

    todo = batches[coarse:]
    states = to_cut(todo[0])
    for number, (z, y) in enumerate(todo):
        x = states[-1]
        predicted = regress(pairs, x, y, classes, decay, ridge, targets)  # processor A
        p, of_a = backward(delta, predicted, states, a)
        update([*a, w["stem"]], [*of_a, [p.T @ z, p.sum(0)]], eta)
        if number + 1 < len(todo):
            states = to_cut(todo[number + 1])
        after = forward(delta, x, b)  # processor B
        loss, p, head = end(after[-1], y, w["head"])
        p, of_b = backward(delta, p, after, b)
        update([*b, w["head"]], [*of_b, head], eta)
        losses.append(loss)
        pairs.append((x, y, p))  # synchronisation
        wrong, size = predicted - p, predicted.norm()
        mse = (wrong**2).mean()
        errors.append([mse, mse / (p**2).mean(), wrong.norm() / (eta * size) if size > 0 else torch.inf])
    return losses, w, errors
