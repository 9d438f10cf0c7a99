"""A slow, obvious transcription of LocoProp: what the library's steps are compared with.

"LocoProp: Enhancing BackProp via Local Loss Optimization", Algorithms 1 to 4 and their anchored forms (Eq. 4, 8, 17,
19), for fully connected networks. As in the paper biases are a last column of the weights, samples are columns, and
plain gradient descent is inside. Where the print is at odds with itself: M's target takes the gradient in the
PRE-activation (Algorithm 2), and the activations that ProxProp updates are those of layer m, not of layer M
(Appendix C). Nothing is shared with the library.
"""

import torch
from torch import nn


def with_ones(y):
    return torch.cat([y, torch.ones(1, y.shape[1], dtype=y.dtype)])


def forward(weights, functions, x):
    """``(inputs, pre-activations, post-activations)`` of each layer; inputs have a last row of ones."""
    inputs, pre, post = [], [], []
    for w, f in zip(weights, functions, strict=True):
        inputs.append(with_ones(x))
        pre.append(w @ inputs[-1])
        x = f(pre[-1])
        post.append(x)
    return inputs, pre, post


def gradients(weights, functions, x, loss):
    """Values and the loss's gradients in pre- and post-activations; ``loss`` takes the last post-activation."""
    weights = [w.detach().requires_grad_() for w in weights]
    inputs, pre, post = forward(weights, functions, x)
    in_pre = torch.autograd.grad(loss(post[-1]), pre, retain_graph=True)
    in_post = torch.autograd.grad(loss(post[-1]), post)
    return [[t.detach() for t in values] for values in (inputs, pre, post, in_pre, in_post)]


def jacobian_transposed(f, a, error):
    """J_f(a)^T error, sample by sample."""
    columns = []
    for column, e in zip(a.T, error.T, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: f(v.reshape(-1, 1)).flatten(), column)
        columns.append(jacobian.T @ e)
    return torch.stack(columns, 1)


def local_gradient(variant, w, f, y, target):
    """The gradient of a layer's local loss in its weights, a sum over samples."""
    a = w @ y
    if variant == "S":
        return (a - target) @ y.T
    if variant == "M":
        return (f(a) - target) @ y.T
    if variant == "PocoS":
        return jacobian_transposed(f, a, f(a) - target) @ y.T
    return jacobian_transposed(f, a, a - target) @ y.T


def step(variant, weights, functions, x, loss, rate, gamma, iterations, anchored=False):
    """The new weights after one batch."""
    inputs, pre, post, in_pre, in_post = gradients(weights, functions, x, loss)
    targets = {
        "S": [a - gamma * g for a, g in zip(pre, in_pre, strict=True)],
        "M": [y - gamma * g for y, g in zip(post, in_pre, strict=True)],
        "PocoS": [y - gamma * g for y, g in zip(post, in_post, strict=True)],
        "PocoM": [a - gamma * g for a, g in zip(pre, in_post, strict=True)],
    }[variant]
    new = []
    for old, f, y, target in zip(weights, functions, inputs, targets, strict=True):
        w = old
        for j in range(iterations):
            share = 1.0 if anchored else max(1 - j / 10, 0.25)
            start = old if anchored else w
            w = start - rate * share * local_gradient(variant, w, f, y, target)
        new.append(w)
    return new


def closed_form(weights, functions, x, loss, rate, gamma, fisher_inverse=None):
    """Where the anchored S iterate ends: W - rate gamma D^-1 G (I + rate Y Y^T)^-1, with D = I or given (Eq. 15)."""
    inputs, _, _, in_pre, _ = gradients(weights, functions, x, loss)
    new = []
    for m, (w, y, g) in enumerate(zip(weights, inputs, in_pre, strict=True)):
        left = torch.eye(len(g), dtype=g.dtype) if fisher_inverse is None else fisher_inverse[m]
        right = torch.linalg.inv(torch.eye(len(y), dtype=y.dtype) + rate * y @ y.T)
        new.append(w - rate * gamma * left @ (g @ y.T) @ right)
    return new


def proxprop(weights, functions, x, loss, tau, rate):
    """Appendix C: targets made from the top down, exact proximal steps, plain gradient descent in the last layer."""
    inputs, pre, post, in_pre, in_post = gradients(weights, functions, x, loss)
    new = [w.clone() for w in weights]
    new[-1] = weights[-1] - tau * in_pre[-1] @ inputs[-1].T
    wanted = post[-2] - tau * in_post[-2]
    for m in reversed(range(len(weights) - 1)):
        target = pre[m] - jacobian_transposed(functions[m], pre[m], post[m] - wanted)
        y = inputs[m]
        if m > 0:
            wanted = post[m - 1] - weights[m][:, :-1].T @ (pre[m] - target)
        inverse = torch.linalg.inv(y @ y.T + torch.eye(len(y), dtype=y.dtype) / rate)
        new[m] = (target @ y.T + weights[m] / rate) @ inverse  # argmin |W y - target|^2 / 2 + |W - W_m|^2 / (2 rate)
    return new


def rmsprop(weights, gradients, rate, decay, momentum, eps):
    """TensorFlow's RMSProp over a list of gradients, number by number."""
    w, square, buffer = weights.clone().flatten(), torch.ones(weights.numel()), torch.zeros(weights.numel())
    for gradient in gradients:
        for i, g in enumerate(gradient.flatten().tolist()):
            square[i] = decay * square[i] + (1 - decay) * g * g
            buffer[i] = momentum * buffer[i] + rate * g / (square[i] + eps) ** 0.5
            w[i] = w[i] - buffer[i]
    return w.reshape(weights.shape)


class Functional(nn.Module):
    """Blocks without modules for their activations."""

    def __init__(self, function):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        for block in self.blocks:
            x = self.function(block(x))
        return self.head(x)
