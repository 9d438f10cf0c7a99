"""A place to try steps in: a real optimiser on the real weights, and everything restored bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from horizonplan.batch import nbytes
from horizonplan.chain import Chain
from horizonplan.chain.calls import rng_devices
from horizonplan.probes.budget import host_copy
from horizonplan.probes.tracker import own_bytes

Optimize = Callable[[Any], Optimizer] | Optimizer


class HasModel(Protocol):
    """A chain, or anything else around a model."""

    @property
    def model(self) -> nn.Module:
        """The model."""


def optimizer_for(parameters: list[nn.Parameter], optimizer: Optimize | None) -> Optimizer:
    """A fresh optimiser of the user's kind: theirs is never stepped by a probe.

    Args:
        parameters: what to optimise.
        optimizer: a callable from parameters to an Optimizer, an Optimizer (one of its class is made,
            with its parameter groups' settings), or ``None`` for ``AdamW(lr=1e-3)``.

    Raises:
        ValueError: it is neither, the callable returns no Optimizer, or the parameters are another model's.
    """
    if optimizer is None:
        return torch.optim.AdamW(parameters, lr=1e-3)
    if isinstance(optimizer, Optimizer):
        made: Any = like(optimizer, [dict(group) for group in optimizer.param_groups])
    else:
        made = optimizer(parameters) if callable(optimizer) else None
    check_optimizer(made, parameters, optimizer)
    return made  # type: ignore[no-any-return]


def like(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """A fresh optimiser of the same class over parameter groups with their settings.

    Raises:
        ValueError: the class cannot be made from its groups alone.
    """
    try:
        return type(optimizer)(groups)  # type: ignore[call-arg]
    except TypeError as error:
        raise ValueError(
            f"optimizer: no second {type(optimizer).__name__} can be made from its parameter groups ({error}); give "
            "callable(params) -> Optimizer."
        ) from error


def make_state(optimizer: Optimizer) -> None:
    """Let an optimiser make its state, as its first step does, by a step with zero gradients."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def check_optimizer(optimizer: object, parameters: list[nn.Parameter], given: object) -> None:
    """See that what was made of the argument ``given`` is an Optimizer over this model's parameters and no other's.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer={given!r}: give callable(params) -> torch.optim.Optimizer, an Optimizer, or None.")
    known = {id(p) for p in parameters}
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not held or any(id(p) not in known for p in held):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} holds none of this model's trainable parameters, or another "
            "model's; make it from model.parameters()."
        )


@contextmanager
def restored(chain: HasModel, weights: bool = False) -> Iterator[None]:
    """Bring buffers, gradients, random state and (``weights``) parameters back, whatever happens inside.

    The copies are in the host's memory. Gradients start as ``None``, and post-accumulate hooks of the
    user's (a fused optimiser step, say) rest.
    """
    model = chain.model
    rng = random_state(chain)
    own = [(m._buffers, dict(m._buffers)) for m in model.modules() if m._buffers]
    buffers = [(b, host_copy(b)) for _, kept in own for b in kept.values() if b is not None]
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters]
    values = [host_copy(p) for p in parameters] if weights else []
    hooks = [(h, dict(h)) for p in parameters if (h := getattr(p, "_post_accumulate_grad_hooks", None))]
    try:
        for live, _ in hooks:
            live.clear()
        for p in parameters:
            p.grad = None
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=False):
                p.copy_(value)
            for buffer, value in buffers:
                buffer.copy_(value)
        for owner, kept in own:
            owner.clear()
            owner.update(kept)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        for live, saved in hooks:
            live.update(saved)
        set_random_state(chain, rng)


def seed_all(chain: Chain, seed: int) -> None:
    """Seed torch's generators that the model may use, and no other device's."""
    torch.default_generator.manual_seed(seed)
    for device in rng_devices(chain.model):
        torch.cuda.default_generators[device].manual_seed(seed)


def random_state(chain: HasModel) -> list[Tensor]:
    """State of torch's generators: the CPU's, then those of the model's CUDA devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in rng_devices(chain.model))]


def set_random_state(chain: HasModel, states: list[Tensor]) -> None:
    """Set what ``random_state`` returned."""
    torch.set_rng_state(states[0])
    for device, state in zip(rng_devices(chain.model), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def trainable(chain: Chain) -> list[nn.Parameter]:
    """The parameters an optimiser gets."""
    return [p for p in chain.parameters() if p.requires_grad]


def standing_bytes(chain: Chain, optimizer: Optimizer, batch: Any, extra: nn.Module | None = None) -> int:
    """Bytes alive when a step begins: parameters, buffers, optimiser state and the batch.

    ``extra``: auxiliary heads, which count too.
    """
    besides = [] if extra is None else [*extra.parameters(), *extra.buffers()]
    own = own_bytes(list(chain.parameters()), list(chain.model.buffers()), besides, dict(optimizer.state))
    return own + nbytes(batch)
