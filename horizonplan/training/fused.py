"""A fused optimiser step: a parameter is updated when its gradient is complete, and the gradient is freed at once.

A plain step has all gradients alive together before the optimiser sees the first. In a fused step those of one
operation of autograd are, at most a block's, and the optimiser's temporaries for one parameter, which may come on top
of activations that a plain step has freed by then. A weight with several uses still waits for the last of them.
The price is a call of ``optimizer.step`` for each parameter.

Every operation of a schedule reads the weights of one block (``Run``, ``Rerun``, ``Pull``) or of the head (``Loss``).
So a weight may change in the middle of a step if the last operation that reads it is also the last that trains it:
:func:`check_schedule`. The weights of several modules or windows are handed over after the last of their uses
(:mod:`horizonplan.gradient.sums`), and within one backward pass autograd calls a parameter's hook after every operator
that differentiates it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from horizonplan.chain import Chain
from horizonplan.gradient.sums import trained_by
from horizonplan.schedule import Pull, Rerun, Schedule

_PER_PARAMETER = ("params", "param_names")  # the lists of a group; all else are its settings


@contextmanager
def fused(optimizer: Optimizer) -> Iterator[None]:
    """For the backward pass of one step: update each parameter once its gradient is complete, and free the gradient.

    It takes the place of ``optimizer.step()`` and changes weights and optimiser state bit for bit as that does. The
    optimiser is the user's own, with its state and the present settings of its groups; ``state_dict`` and schedulers
    of the learning rate work as ever. A parameter without a gradient is skipped. Other post-accumulate hooks of a
    parameter that were there before run first (and may clip its gradient). Whether an optimiser of one's own needs
    other parameters to update one cannot be seen from here: those of ``torch.optim`` do not, but for LBFGS.

    There is no moment at which all gradients are known, so none for clipping by their norm, for unscaling, or for
    stopping before a gradient that is not finite has changed a weight. A weight that the forward reads a second time
    through ``.detach()`` may have changed by then.

    Args:
        optimizer: whose parameters are updated; their gradients must be ``None`` at the start.

    Raises:
        ValueError: the optimiser cannot update one parameter alone, or has step hooks; a gradient is there already;
            and, when other parameters may be updated already, a second gradient arrives for one parameter (several
            backward passes), a step changes a setting of its group, or a weight is read after its update.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> with fused(optimizer):
    ...     model(torch.ones(2, 3)).sum().backward()
    >>> model.weight.grad is None, len(optimizer.state)
    (True, 2)
    """
    _refuse(optimizer)
    done: set[Tensor] = set()
    hooks = [
        p.register_post_accumulate_grad_hook(partial(_update, optimizer, done, group, place))
        for group in optimizer.param_groups
        for place, p in enumerate(group["params"])
        if p.requires_grad
    ]
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ValueError(
            "fused: the backward pass reads a tensor that was changed in place, most likely a weight after its update "
            "(one that is also used through .detach(), or in a second backward pass): take the plain step."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def check_schedule(chain: Chain, schedule: Schedule) -> None:
    """See that no operation of a schedule reads a block after the last one that updates it.

    Raises:
        ValueError: one does: a later window passes through the block to update others. Windows of horizons, of LoCo
            and of local learning do not.
    """
    read: dict[int, int] = {}
    trained: dict[int, int] = {}
    for place, op in enumerate(schedule.ops(chain.stem_trains, chain.trainable)):
        if isinstance(op, Pull | Rerun):
            read[op.t] = place
        trained |= dict.fromkeys(trained_by(op), place)
    if late := sorted(t for t in read if read[t] > trained.get(t, read[t])):
        raise ValueError(
            f"fused: windows={schedule.windows} pass through blocks {late} after their last update, so these would "
            "have changed by then: let the last window over a block update it, or take the plain step."
        )


def _refuse(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimiser whose step is more than one parameter's update after the other."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"fused: optimizer={optimizer!r}: give a torch.optim.Optimizer.")
    name = type(optimizer).__name__
    needed = [p for p in inspect.signature(type(optimizer).step).parameters.values() if p.default is p.empty]
    if [p.name for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD] != ["self"]:
        raise ValueError(f"fused: {name}.step needs a closure, so all parameters at once: take the plain step.")
    if (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    ):
        raise ValueError(
            f"fused: {name} has hooks on its step, which would run once a parameter instead of once a step: remove "
            "them, or take the plain step."
        )
    if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"fused: {name} has parameters with a gradient already, and the sum over several backward passes cannot "
            "be waited for: call optimizer.zero_grad(set_to_none=True) first, or take the plain step."
        )


def _update(optimizer: Optimizer, done: set[Tensor], group: dict[str, Any], place: int, parameter: Tensor) -> None:
    """The parameter's hook: a step of the optimiser as if it had no other, then free the gradient."""
    if parameter in done:
        raise ValueError(
            f"fused: a second gradient of a parameter of shape {tuple(parameter.shape)} arrived in one step, after its "
            "update: use one backward pass for each fused(optimizer), or take the plain step."
        )
    done.add(parameter)
    alone = {**group, **{key: [group[key][place]] for key in _PER_PARAMETER if key in group}}
    groups, optimizer.param_groups = optimizer.param_groups, [alone]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
    parameter.grad = None
    changed = [key for key, value in alone.items() if key not in _PER_PARAMETER and value is not group.get(key)]
    if changed:
        raise ValueError(
            f"fused: {type(optimizer).__name__}.step changes {changed} of its parameter group, which are one for all "
            "parameters and a step: take the plain step."
        )
