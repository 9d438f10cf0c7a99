"""A slow, obvious transcription of successive gradient reconciliation: what SGR's gradients are compared with.

Algorithm 1 of "Towards Interpretable Deep Local Learning with Successive Gradient Reconciliation", with the gradient in
*every* module's output kept for the next one, as the text has it (the printed loop keeps the first one's only).
Nothing is shared with the library.
"""

import torch
from torch.nn import functional as F


def flat(gradient, normalize):
    gradient = gradient.flatten(1)
    return gradient / gradient.square().sum(1, keepdim=True).sqrt() if normalize else gradient


def term(now, before, normalize):
    """Algorithm 1: MSELoss of the normalised gradients; Eq. 6: the squared norm of each sample's difference."""
    if normalize:
        return F.mse_loss(flat(now, True), flat(before, True))
    samples = len(now)  # whose own gradients are so many times those of the mean loss
    return torch.stack([(samples * difference).square().sum() for difference in now - before]).mean()


def objective(module, loss, xin, before, weight, normalize, create_graph=True):
    """A module's objective at a constant input (Eq. 5); returns it, its loss, the regulariser, its output."""
    xin = xin.detach().requires_grad_()
    out = module(xin)
    value = loss(out)
    if before is None or weight == 0:
        return value, value, None, out
    (now,) = torch.autograd.grad(value, xin, create_graph=create_graph, retain_graph=True)
    regulariser = term(now, before.detach(), normalize)
    return value + weight * regulariser, value, regulariser, out


def gradients(modules, losses, x, weight, normalize, only_first_delta=False):
    """``(gradients, local losses, regularisers)`` of a list of modules (callables) with local losses ``f(output)``.

    ``gradients[k]`` maps each parameter that module k's objective reaches to its gradient.
    """
    found, values, terms, before = [], [], [], None
    for k, (module, loss) in enumerate(zip(modules, losses, strict=True)):
        total, value, regulariser, out = objective(module, loss, x, before, weight, normalize)
        parameters = [p for part in (module, loss) for p in parameters_of(part) if p.requires_grad]
        parts = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        found.append({p: g for p, g in zip(parameters, parts, strict=True) if g is not None})
        values.append(value.detach())
        terms += [] if regulariser is None else [regulariser.detach()]
        if k == 0 or not only_first_delta:
            (before,) = torch.autograd.grad(value, out)
        x = out.detach()
    return found, values, terms


def parameters_of(part):
    return [p for m in getattr(part, "parts", [part]) if isinstance(m, torch.nn.Module) for p in m.parameters()]


class Run:
    """Modules one after another, as one callable."""

    def __init__(self, *parts):
        self.parts = [part for part in parts if part is not None]

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x


class LossAt:
    """A head and a loss at a target, as one callable."""

    def __init__(self, head, loss, target):
        self.parts = [head]
        self.loss, self.target = loss, target

    def __call__(self, x):
        return self.loss(self.parts[0](x), self.target)


def summed(found):
    """One dictionary: a parameter of several modules gets the sum."""
    total = {}
    for part in found:
        for p, g in part.items():
            total[p] = total[p] + g if p in total else g
    return total
