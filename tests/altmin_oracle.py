"""Alternating minimisation as the paper prints it, layer by layer, for a perceptron and for an Elman network.

Slow and obvious: each sub-problem is a function of one code, and its slope is taken from that function.
"""

import torch
from torch.nn import functional as F


def descend(problem, start, rate, steps):
    """Plain gradient descent on a function of one tensor."""
    code = start.detach()
    for _ in range(steps):
        code = code.detach().requires_grad_()
        (slope,) = torch.autograd.grad(problem(code), code)
        code = (code - rate * slope).detach()
    return code


def loss_of(scores, y):
    """Eq. 2, summed over samples."""
    return F.cross_entropy(scores, y, reduction="sum")


class Perceptron:
    """Algorithms 2.2 and 2.3 for ``layers`` (weight, bias) with one activation between them."""

    def __init__(self, layers, activation, mu, rate, steps, proximal):
        self.layers, self.activation = layers, activation
        self.mu, self.rate, self.steps, self.proximal = mu, rate, steps, proximal

    def encode(self, x):
        codes = []
        for weight, bias in self.layers[:-1]:
            below = x if not codes else self.activation(codes[-1])
            codes.append(below @ weight.T + bias)
        return codes

    def problem(self, level, codes, forward, y):
        """Eq. 4 or 5, divided by mu; the layer below still has its forward code."""
        weight, bias = self.layers[level + 1]

        def value(code):
            above = self.activation(code) @ weight.T + bias
            last = level == len(codes) - 1
            first = loss_of(above, y) / self.mu if last else (codes[level + 1] - above).square().sum()
            return first + self.proximal * (code - forward[level]).square().sum()

        return value

    def update_codes(self, x, y):
        forward = self.encode(x)
        codes = list(forward)
        for level in reversed(range(len(codes))):
            codes[level] = descend(self.problem(level, codes, forward, y), forward[level], self.rate, self.steps)
        return codes

    def update_weights(self, x, y, codes, rate):
        """One step of gradient descent on Eq. 3 divided by the number of samples."""
        inputs = [x, *(self.activation(code) for code in codes)]
        updated = []
        for level, (weight, bias) in enumerate(self.layers):
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            out = inputs[level] @ w.T + b
            term = loss_of(out, y) if level == len(codes) else self.mu * (codes[level] - out).square().sum()
            slopes = torch.autograd.grad(term / len(x), (w, b))
            updated.append((weight - rate * slopes[0], bias - rate * slopes[1]))
        return updated


def elman_codes(cell, above, x, rate, steps, proximal):
    """Codes c^1, ..., c^T of Eq. 17, from the last time step to the first.

    ``cell``: (U, W, b); ``above(codes)``: the term of Eq. 5 that reads the hidden states of all time steps.
    """
    u, w, b = cell
    forward, hidden = [], torch.zeros(len(x), len(w), dtype=x.dtype)
    for t in range(x.shape[1]):
        forward.append(x[:, t] @ u.T + hidden @ w.T + b)
        hidden = torch.tanh(forward[-1])
    codes = list(forward)
    for t in reversed(range(len(codes))):

        def problem(code, t=t):
            value = above([*codes[:t], code, *codes[t + 1 :]])
            if t + 1 < len(codes):
                after = x[:, t + 1] @ u.T + torch.tanh(code) @ w.T + b
                value = value + (codes[t + 1] - after).square().sum()
            return value + proximal * (code - forward[t]).square().sum()

        codes[t] = descend(problem, forward[t], rate, steps)
    return codes


def columns(weight, a, b):
    """Block-coordinate descent over the columns, one by one."""
    weight = weight.clone()
    for j in range(weight.shape[1]):
        if a[j, j] > 0:
            weight[:, j] += (b[:, j] - weight @ a[:, j]) / a[j, j]
    return weight
