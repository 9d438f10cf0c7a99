"""Slow, obvious transcriptions of the definition: what every gradient is compared with.

A window ``(first, stop, end)`` takes x(first) as a constant, evaluates the loss at x(end) and gives
its gradient to blocks first..stop-1 (Eq. 9 and Remark 3.2 of the MPC paper). A block updated by
several windows, or a parameter used several times, gets the sum. The stem trains with block 0, the
head with the terminal loss only. Nothing is shared with the library but the projection.
"""

import copy

import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

from horizonplan.projection import project


class Uses:
    """Copies of a module's parameters, so that the gradient of each *use* of a tied weight can be told apart."""

    def __init__(self, module):
        self.module = module
        is_module = isinstance(module, torch.nn.Module)
        self.originals = {n: p for n, p in module.named_parameters() if p.requires_grad} if is_module else {}
        self.copies = {n: p.detach().clone().requires_grad_() for n, p in self.originals.items()}
        self.buffers = {n: b.clone() for n, b in module.named_buffers()} if is_module else {}

    def __call__(self, x):
        if self.module is None:
            return x
        if not isinstance(self.module, torch.nn.Module):
            return self.module(x)
        return functional_call(self.module, {**self.copies, **self.buffers}, (x,))


def gradients(stem, blocks, head, loss, batch, windows, projection=project):
    """``{parameter: gradient}`` of a chain in parts, one forward from the start per window.

    With dropout, seed the generator before and pass the same seed to the code under test: every
    window runs the chain from the generator's state on entry.
    """
    inputs, target = batch
    depth, total = len(blocks), {}
    rng = torch.get_rng_state()
    with torch.no_grad():
        x = Uses(stem)(inputs)
        for block in blocks:
            x = Uses(block)(x)
    wanted = x.shape
    for window in windows:
        torch.set_rng_state(rng)
        uses = [Uses(m) for m in (stem, *blocks, head)]
        x = uses[0](inputs)
        for t in range(window.end):
            if t == window.first and window.first > 0:
                x = x.detach()
            x = uses[t + 1](x)
        x = x if x.shape == wanted else projection(x, tuple(wanted))
        value = loss(uses[-1](x), target)
        trained = [uses[t + 1] for t in range(window.first, window.stop)]
        trained += [uses[0]] * (window.first == 0) + [uses[-1]] * (window.end == depth)
        _add(value, [(copy, use.originals[n]) for use in trained for n, copy in use.copies.items()], total)
    return total


def gradients_inside(model, names, groups, compute, batch, windows):
    """The same for a model with its own forward, by replacing blocks in copies of the model.

    Args:
        model: any module without tied weights and, between its blocks, without dropout.
        names: its blocks' names.
        groups: names of parameters: ``groups[t]`` trained with block t, ``groups[-1]`` with the terminal loss.
        compute: ``(model, batch) -> loss``.
        batch: the batch.
        windows: the schedule's windows.
    """
    depth, total = len(names), {}
    rng = torch.get_rng_state()
    states = []
    probe = copy.deepcopy(model)
    for name in names:
        _wrap(probe.get_submodule(name), lambda x: states.append(x.detach().clone()) or x)
    with torch.no_grad():
        compute(probe, batch)
    wanted = states[-1].shape
    for window in windows:
        torch.set_rng_state(rng)
        twin = copy.deepcopy(model)
        reached = []
        for t, name in enumerate(names):
            block = twin.get_submodule(name)
            if t == window.first - 1:
                _wrap(block, torch.Tensor.detach)
            if t == window.end - 1:
                _wrap(block, lambda x, reached=reached: reached.append(x.clone()) or x)
            if window.end <= t < depth - 1:
                _skip(block, states[t].clone)
            if window.end <= t == depth - 1:
                _skip(block, lambda reached=reached: project(reached[0], tuple(wanted)))
        value = compute(twin, batch)
        mine = {n for t in range(window.first, window.stop) for n in groups[t]}
        mine |= set(groups[-1]) if window.end == depth else set()
        inner, outer = dict(twin.named_parameters()), dict(model.named_parameters())
        _add(value, [(inner[n], outer[n]) for n in sorted(mine) if inner[n].requires_grad], total)
    return total


def _add(value, pairs, total):
    if pairs and value.requires_grad:
        found = torch.autograd.grad(value, [copy for copy, _ in pairs], allow_unused=True)
        for (_, parameter), grad in zip(pairs, found, strict=True):
            if grad is not None:
                total[parameter] = total[parameter] + grad if parameter in total else grad


def _wrap(block, function):
    forward = block.forward

    def wrapped(*args, **kwargs):
        leaves, spec = tree_flatten(forward(*args, **kwargs))
        leaves[0] = function(leaves[0])
        return tree_unflatten(leaves, spec)

    block.forward = wrapped


def _skip(block, state):
    forward = block.forward

    def skipped(*args, **kwargs):
        with torch.no_grad(), torch.random.fork_rng():
            leaves, spec = tree_flatten(forward(*args, **kwargs))
        leaves[0] = state()
        return tree_unflatten(leaves, spec)

    block.forward = skipped


def named(model, gradients):
    """``{name: gradient}`` of ``{parameter: gradient}``."""
    return {n: gradients[p] for n, p in model.named_parameters() if p in gradients}


def step(function, model, seed=7):
    """Call ``function`` on a clean slate; return its loss and ``{name: gradient}``, and clean up again.

    The generator starts from ``seed``, buffers are put back.
    """
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    try:
        loss = function()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(buffers[n])


def back_propagation(chain, batch, seed=7):
    """The model's own loss and ``loss.backward()``."""

    def own():
        loss = chain.loss(batch)
        loss.backward()
        return loss

    return step(own, chain.model, seed)


def assert_same_gradients(found, wanted, tolerance=0.0):
    """The same parameters have gradients, and each is within ``tolerance`` of it by norm (0: bit for bit)."""
    assert set(found) == set(wanted), f"only one side: {sorted(set(found) ^ set(wanted), key=str)}"
    for key, grad in wanted.items():
        if tolerance == 0:
            assert torch.equal(found[key], grad), f"{key}: {distance(found[key], grad):.1e}"
        else:
            assert distance(found[key], grad) <= tolerance, f"{key}: {distance(found[key], grad):.1e}"


def distance(found, wanted):
    """Relative to the norm; gradients that are zero up to rounding (a bias before BatchNorm) count as zero."""
    return ((found - wanted).norm() / max(wanted.norm().item(), 1e-6)).item()


class Flops(TorchDispatchMode):
    """Floating-point operations of every dispatched operator that torch has a formula for."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(function):
    """How many floating-point operations a call dispatches."""
    with Flops() as counter:
        function()
    return counter.total
