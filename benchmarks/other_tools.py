"""Other tools' predictions of a training step's peak bytes, each used as its documentation says.

    pip install --no-deps torch-kitsune==0.7.0 ckptplan==0.1.0rc1      # neither is a dependency of horizonplan

- ``torch-kitsune`` (module ``kitsune``): static, without a run: parameters, gradients, optimiser state, and the outputs
  of the leaf modules of a trial forward on one float tensor; 15 % are added for the CUDA allocator. Checkpointing is
  one of its recommendations, with the bytes that it would save. ``estimate_lora_memory`` is its way for LoRA.
- ``ckptplan``: measures the activation bytes of declared blocks, on CUDA only, and plans which to checkpoint.
- ``MemTracker`` of torch (private, ``torch.distributed._tools``): watches a step. Under ``FakeTensorMode`` nothing is
  computed or allocated in it, which makes a prediction of it. It allows one call of the model a step, where a truncated
  horizon calls it for every loss; ``reset_mod_stats()`` before each call, its remedy, ended in a KeyError.

A tool is a function of a chain, a batch and a schedule that returns bytes, or raises what the tool raises.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from horizonplan import Chain, Schedule
from horizonplan.probes import LiveBytes
from horizonplan.probes.memory import step
from horizonplan.probes.steady import optimizer_for, restored, standing_bytes, trainable

Tool = Callable[[Chain, Any, Schedule], int]


class NoNumber(Exception):
    """The tool has no way to express this."""


def is_exact(schedule: Schedule) -> bool:
    """Whether the schedule is back-propagation, checkpointed or not."""
    return len(schedule.windows) == 1


@contextmanager
def checkpointing(chain: Chain, every_block: bool) -> Iterator[None]:
    """The model with ``torch.utils.checkpoint`` around every block, the way a user would train it."""
    blocks = chain.blocks if every_block else ()
    with chain.running():
        for block in blocks:
            block.forward = _checkpointed(block.forward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def plain_step(chain: Chain, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    """One full training step in plain torch."""
    optimizer.zero_grad(set_to_none=True)
    chain.loss(batch).backward()
    optimizer.step()


def plain_bytes(chain: Chain, batch: Any, schedule: Schedule) -> int:
    """Exact peak of the plain step at steady state, measured as ``probes.memory`` measures the engine's."""
    with restored(chain, weights=True), checkpointing(chain, schedule.recompute > 0):
        optimizer = optimizer_for(trainable(chain), None)
        plain_step(chain, batch, optimizer)
        optimizer.zero_grad(set_to_none=True)
        with LiveBytes() as tracker:
            plain_step(chain, batch, optimizer)
        return standing_bytes(chain, optimizer, batch) + tracker.peak


@contextmanager
def fake(chain: Chain) -> Iterator[FakeTensorMode]:
    """The chain's parameters and buffers as fake tensors, which have no memory of their own."""
    mode = FakeTensorMode()
    own = [group for module in chain.model.modules() for group in (module._parameters, module._buffers)]
    kept = [dict(group) for group in own]
    try:
        for group in own:
            group.update({name: mode.from_tensor(t) for name, t in group.items() if t is not None})
        with mode:
            yield mode
    finally:
        for group, tensors in zip(own, kept, strict=True):
            group.update(tensors)


def mem_tracker(chain: Chain, batch: Any, schedule: Schedule) -> int:
    """Torch's MemTracker on a step at steady state: a fake one of plain torch, or a real one of the engine's."""
    from torch.distributed._tools.mem_tracker import MemTracker

    exact, tracker = is_exact(schedule), MemTracker()
    with ExitStack() as stack:
        stack.enter_context(restored(chain, weights=not exact))
        if exact:
            stack.enter_context(checkpointing(chain, schedule.recompute > 0))
            mode = stack.enter_context(fake(chain))
            batch = tree_map_only(torch.Tensor, mode.from_tensor, batch)
        optimizer = optimizer_for(trainable(chain), None)
        one = partial(plain_step, chain, batch) if exact else partial(step, chain, batch, schedule)
        one(optimizer)
        optimizer.zero_grad(set_to_none=True)
        tracker.track_external(chain.model, optimizer, *(x for x in tree_leaves(batch) if isinstance(x, torch.Tensor)))
        with tracker:
            one(optimizer)
    return int(tracker.get_tracker_snapshot("peak")[chain.device]["Total"])


def kitsune(chain: Chain, batch: Any, schedule: Schedule, margin: bool = True) -> int:
    """``predict_memory``, with or without its margin, less what its recommendation saves if checkpointed."""
    from kitsune.predict import LoRAConfig, estimate_lora_memory, predict_memory

    if not is_exact(schedule):
        raise NoNumber("knows back-propagation only")
    x = batch[0] if isinstance(batch, tuple) else batch.get("input_ids", batch.get("pixel_values"))
    shape, rows = tuple(x.shape[1:]), x.shape[0]
    with restored(chain):
        if (lora := getattr(chain.model, "peft_config", None)) is not None:
            if schedule.recompute:
                raise NoNumber("estimate_lora_memory knows no checkpointing")
            base: nn.Module = copy.deepcopy(chain.model).unload()  # type: ignore[operator]
            wanted = lora["default"]
            config = LoRAConfig(rank=wanted.r, target_modules=tuple(wanted.target_modules))
            estimate = estimate_lora_memory(base, shape, rows, config=config)
            return int(estimate.total_bytes - (0 if margin else estimate.overhead_bytes))
        found = predict_memory(chain.model, shape, rows, dtype=torch.float32, optimizer="adamw", training=True)
    total = int(found.total_bytes - (0 if margin else found.overhead_bytes))
    if not schedule.recompute:
        return total
    saved = [r.savings_bytes for r in found.recommendations if r.name == "Gradient Checkpointing"]
    if not saved:
        raise NoNumber("does not recommend checkpointing")
    return int(total - saved[0])


def ckptplan(chain: Chain, batch: Any, schedule: Schedule) -> int:
    """``declare_blocks``, ``profile_blocks`` (a block gets what the last one returned), ``plan_checkpoints``."""
    from ckptplan import declare_blocks, plan_checkpoints, profile_blocks

    if not is_exact(schedule):
        raise NoNumber("knows back-propagation only")
    calls: list[tuple[Any, Any]] = []
    with restored(chain), chain.running():
        first = chain.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            chain.loss(batch)
        first.remove()
        blocks = declare_blocks(chain.model, list(zip(chain.names, chain.blocks, strict=True)))
        profiles = profile_blocks(blocks, *calls[0], device=chain.device, dtype=torch.float32)
        planner = "checkpoint_all" if schedule.recompute else "no_checkpoint"
        what = {"target_kind": "activation_saving_fraction", "target_value": 1.0, "on_infeasible": "best_effort"}
        plan_checkpoints(profiles, blocks, planner=planner, **what)
    raise NoNumber("plans activations of blocks, not the peak of a step")


TOOLS: dict[str, Tool] = {
    "kitsune": kitsune,
    "less margin": partial(kitsune, margin=False),
    "ckptplan": ckptplan,
    "MemTracker": mem_tracker,
}
