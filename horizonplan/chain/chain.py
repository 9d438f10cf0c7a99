"""A model as stem -> blocks -> head: what the engine, the probes and the planner work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.batch import (
    ComputeLoss,
    LossFunction,
    default_loss,
    model_inputs,
    resolve_loss,
    scalar,
    signature,
    target_of,
    tensors,
)
from horizonplan.chain.calls import finite, quiet, regrouped, without_cache
from horizonplan.chain.find import Found, find_blocks, named_blocks, refuse_layer_drop
from horizonplan.chain.head import HeadOnly, OutputOnly
from horizonplan.chain.slots import Output, Slot
from horizonplan.chain.trace import WAYS_OUT, ChainError, Layout, Shapes, record_shapes, repeated, trace
from horizonplan.projection import Projection, project

KEPT_SHAPES = 32
_REFUSED = {
    "DataParallel": "DataParallel copies the model in every forward; give the module inside (model.module)",
    "DistributedDataParallel": "give the module inside (model.module)",
    "FullyShardedDataParallel": "sharded roots are not supported",
    "OptimizedModule": "a compiled whole model hides its blocks; compile the blocks instead (block.compile())",
    "RecursiveScriptModule": "a scripted model hides its blocks; give the Python module",
    "GraphModule": "a traced graph hides its blocks; give the original module",
}


class _Composed(nn.Module):
    """Stem, blocks and head one after another: the trivial model."""

    def __init__(self, stem: Any, blocks: Sequence[nn.Module], head: Any) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, x: Any) -> Any:
        if self.stem is not None:
            x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(x)


class Chain:
    """A network of ``depth`` blocks with a loss at every state.

    Built from parts (here) or from any ``nn.Module`` (:meth:`from_model`).

    Args:
        stem: module or callable from the batch's input to x(0); ``None``: the input itself.
        blocks: modules from x(t) to x(t+1).
        head: module or callable from a state to the output; ``None``: the state itself.
        loss: ``(output, target) -> scalar``; ``None``: by the target's type. Batches are ``(input, target)``.
        projection: ``(state, shape) -> tensor`` for states of another shape than x(T)'s; ``None``:
            :func:`horizonplan.projection.project`.

    Raises:
        ValueError: no blocks, or one module given twice.

    >>> chain = Chain(None, [nn.Linear(3, 3) for _ in range(4)], None, nn.MSELoss())
    >>> chain.depth
    4
    """

    def __init__(
        self,
        stem: nn.Module | Callable[[Any], Tensor] | None,
        blocks: Sequence[nn.Module],
        head: nn.Module | Callable[[Tensor], Any] | None,
        loss: LossFunction | None = None,
        projection: Projection | None = None,
    ) -> None:
        blocks = list(blocks)
        if not blocks or not all(isinstance(b, nn.Module) for b in blocks):
            raise ValueError("blocks: give a non-empty list of nn.Modules.")
        if len(set(blocks)) < len(blocks):
            raise ValueError("blocks: one module is used as two blocks; give each block a module of its own.")
        measure = default_loss if loss is None else loss
        model = _Composed(stem, blocks, head)

        def compute(model: nn.Module, batch: Any) -> Tensor:
            return measure(model(model_inputs(batch)), target_of(batch))

        names = tuple(f"blocks.{t}" for t in range(len(blocks)))
        found = Found(names, tuple(blocks))
        self._set(model, found, resolve_loss(compute_loss=compute), _composed_layout(model), projection)
        self.recipe = partial(_recomposed, loss=loss, projection=projection)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        batch: Any,
        blocks: str | Sequence[str] | None = None,
        loss: LossFunction | None = None,
        compute_loss: ComputeLoss | None = None,
        projection: Projection | None = None,
    ) -> Chain:
        """See a model as a chain, by a few trial forwards on ``batch`` (nothing is changed by them).

        Args:
            model: any module whose blocks run one after another in its forward.
            batch: a batch as in training, on the model's device.
            blocks: ``None``: found; or a name pattern (``"transformer.h.*"``), a container's name, or
                a list of submodule names in order.
            loss: ``(output, target) -> scalar``; see :func:`horizonplan.batch.resolve_loss`.
            compute_loss: ``(model, batch) -> scalar``, for anything else.
            projection: as for :class:`Chain`.

        Raises:
            ChainError: the model is no chain; the message names the place and the ways out.
            ValueError: the model rejects the batch, the loss is no scalar, a name matches nothing.
        """
        refuse_wrappers(model)
        compute = resolve_loss(loss, compute_loss)
        run = checked_run(model, batch, compute)
        found = find_blocks(model, run) if blocks is None else named_blocks(model, blocks)
        refuse_layer_drop(model, found, run)
        with regrouped(found.container, found.groups):
            layout = trace(model, found.blocks, found.names, run)
            layout.shapes[signature(batch)] = record_shapes(model, found.blocks, found.names, run)
        chain = cls.__new__(cls)
        chain._set(model, found, compute, layout, projection)
        how: dict[str, Any] = {"blocks": blocks, "loss": loss, "compute_loss": compute_loss, "projection": projection}
        chain.recipe = partial(cls.from_model, **how)
        chain._check_head(batch)
        layout.first = None
        return chain

    recipe: Callable[[nn.Module, Any], Chain]  # makes this chain again from a copy of the model and a batch

    def _set(
        self, model: nn.Module, found: Found, compute: ComputeLoss, layout: Layout, projection: Projection | None
    ) -> None:
        self.model = model
        self.blocks = found.blocks
        self.names = found.names
        self.depth = len(found.blocks)
        self.layout = layout
        self._found = found
        self._compute = compute
        self._projection = projection or project
        self._configured = [m for m in model.modules() if hasattr(m, "config")]
        self._nan: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __repr__(self) -> str:
        return f"Chain({type(self.model).__name__}, depth={self.depth}, blocks={self.names[0]!r}..{self.names[-1]!r})"

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the model."""
        return self.model.parameters()

    def block_parameters(self) -> list[nn.Parameter]:
        """The parameters over which a cosine is taken: trainable, in a block or before one, not stem, not head."""
        found = {id(p): p for t in range(self.depth) for p in self.layout.group(t) if p.requires_grad}
        return list(found.values())

    @property
    def stem_trains(self) -> bool:
        """Whether the stem has parameters to train."""
        return any(p.requires_grad for p in self.layout.before[0])

    @property
    def trainable(self) -> tuple[bool, ...]:
        """Per block, whether it (with what runs before it, the stem excepted) has parameters to train."""
        return tuple(any(p.requires_grad for p in self.layout.group(t)) for t in range(self.depth))

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def loss(self, batch: Any) -> Tensor:
        """The model's loss on a batch, by its own forward: ``loss(batch).backward()`` is back-propagation."""
        return self._compute(self.model, batch)

    def loss_of(self, output: Any, batch: Any) -> Tensor:
        """The loss of an output that something else made in the model's place (an auxiliary head, say).

        Args:
            output: what a call of the model would return.
            batch: the batch, for its target.

        Raises:
            ValueError: the loss needs more of the model than its output.
        """
        try:
            return scalar(self._compute(OutputOnly(output), batch))
        except AttributeError as error:
            raise ValueError(
                f"loss: it reads more of the model than its output ({error}); give a loss of its own."
            ) from error

    def check(self, batch: Any, name: str = "this batch") -> None:
        """Try the model's forward and loss on a batch, changing nothing.

        Raises:
            ValueError: the model rejects the batch, or the loss is no finite scalar.
        """
        with quiet(self.model), torch.no_grad():
            loss = checked_run(self.model, batch, self._compute)()
        if finite(loss) is False:
            raise ValueError(f"loss is {loss.item()} on {name}: check the data and the model's weights.")

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model as the chain needs it in a forward: children grouped into blocks, no key/value cache."""
        with ExitStack() as stack:
            stack.enter_context(regrouped(self._found.container, self._found.groups))
            stack.enter_context(without_cache(self._configured))
            yield

    def nan(self, like: Tensor) -> Tensor:
        """One NaN of a tensor's type, made once."""
        key = (like.device, like.dtype)
        if key not in self._nan:
            self._nan[key] = torch.full((), float("nan"), device=like.device, dtype=like.dtype)
        return self._nan[key]

    def shapes_for(self, batch: Any, states: Sequence[Tensor | None]) -> Shapes | None:
        """Shapes of this batch's states, where an intermediate head needs them; ``None``: all are alike.

        A batch signature not seen before costs one forward without a graph, unless nothing runs
        between the blocks and all states have had one shape.
        """
        key, layout = signature(batch), self.layout
        if not key and (layout.glue or not layout.uniform):
            layout.shapes.pop(key, None)  # a batch without visible tensors may have any shape
        if key in layout.shapes and not layout.glue and layout.uniform:
            return None
        if key not in layout.shapes:
            seen = [tuple(s.shape) for s in states if s is not None]
            known = bool(layout.shapes) or (len(set(seen)) == 1 and len(seen) > 1 and _alike(self.blocks))
            if known and layout.uniform and not layout.glue:
                return None
            layout.shapes[key] = record_shapes(self.model, self.blocks, self.names, lambda: self.loss(batch))
            if len(layout.shapes) > KEPT_SHAPES:
                layout.shapes.pop(next(iter(layout.shapes)))
        return layout.shapes[key]

    def loss_at(
        self,
        state: Tensor,
        batch: Any,
        standins: dict[nn.Module, list[Any]],
        shapes: Shapes | None,
        outputs: Sequence[Output | None],
        passing: list[Tensor | None] | None = None,
    ) -> Tensor:
        """Head and loss at a state that requires grad (Eq. 9: the window's loss).

        ``shapes`` comes from :meth:`shapes_for`, ``standins`` and ``outputs`` from the step's own forward;
        ``passing`` is what each block returns in place of its state (``None``: the state itself).
        """
        z, passing = self._cast(state), passing or [None] * self.depth
        if shapes is not None:
            z = self._project(z, shapes)
            if self.layout.glue:
                passing = [self.nan(state).expand(shape) for shape in shapes.states[1:]]
                standins = {**shapes.standins, **standins}
        known = next(o for o in reversed(outputs) if o is not None)
        head = HeadOnly(
            self.model,
            self.blocks,
            [known if o is None else o for o in outputs],
            standins,
            passing,
            self._outside(),
            dense=self.layout.dense or self.layout.copy_state[-1],
        )
        return head(z, lambda: self.loss(batch))

    def _cast(self, state: Tensor) -> Tensor:
        """A state in x(T)'s type, where that is known and autocast does not decide."""
        dtype = self.layout.dtype
        if dtype is None or state.dtype == dtype or torch.is_autocast_enabled(state.device.type):
            return state
        return state.to(dtype)

    def _project(self, state: Tensor, shapes: Shapes) -> Tensor:
        wanted = (state.shape[0], *shapes.states[-1][1:])
        return state if tuple(state.shape) == wanted else self._projection(state, wanted)

    def _outside(self) -> list[nn.Module]:
        inside = {m for block in self.blocks for m in block.modules()}
        return [m for m in self.model.modules() if m not in inside and m._buffers]

    def _check_head(self, batch: Any) -> None:
        """Try a head at x(1): it must run, be finite where the terminal loss is, and read no other state."""
        if self.depth == 1:
            return
        layout, shapes = self.layout, self.layout.shapes[signature(batch)]
        try:
            try:
                losses = self._trial_heads(batch, shapes)
            except RuntimeError as error:
                if "single memory location" not in str(error):
                    raise
                layout.dense = True
                losses = self._trial_heads(batch, shapes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ChainError(f"the head cannot be evaluated at x(1): {error!r}. {WAYS_OUT}") from error
        if layout.finite and not all(map(math.isfinite, losses)):
            raise ChainError(
                f"the loss at x(1) is {losses[0]}: either it cannot be computed there, or the head reads something "
                f"besides the last state (place-holders of the stem's output are NaN). {WAYS_OUT}"
            )
        if layout.finite and not math.isclose(losses[0], losses[1], rel_tol=1e-5, abs_tol=1e-8):
            raise ChainError(
                f"the loss at x(1) depends on the states before the last one ({losses[0]} and {losses[1]} for two "
                f"choices of them): the head reads an earlier state. {WAYS_OUT}"
            )

    def _trial_heads(self, batch: Any, shapes: Shapes) -> list[float]:
        """The loss at a real x(1), with the state itself and with something else in place of the others."""
        with self.running(), quiet(self.model):
            assert self.layout.first is not None
            state = self.layout.first.clone().requires_grad_()
            others: list[Tensor | None] = [1.5 * state.detach().flip(0)] * self.depth
            needed = self.shapes_for(batch, ())
            return [
                loss.item()
                for passing in (None, others)
                if finite(loss := self.loss_at(state, batch, shapes.standins, needed, self.layout.outputs, passing))
                is not None
            ]


def _recomposed(model: _Composed, batch: Any, loss: LossFunction | None, projection: Projection | None) -> Chain:
    """A chain built by hand, from a copy of its model."""
    return Chain(model.stem, list(model.blocks), model.head, loss, projection)


def _composed_layout(model: _Composed) -> Layout:
    """The layout of a chain built by hand, known without a forward."""
    blocks, depth = list(model.blocks), len(model.blocks)
    stem = [model.stem] if isinstance(model.stem, nn.Module) else []
    head = list(model.head.parameters()) if isinstance(model.head, nn.Module) else []
    before: list[list[nn.Parameter]] = [[p for m in stem for p in m.parameters()], *([] for _ in blocks[1:])]
    owned = [list(block.parameters()) for block in blocks]
    plain = Output.of(torch.zeros(1))
    return Layout(
        slots=[Slot(0)] * depth,
        block=owned,
        before=before,
        head=head,
        shared=repeated([*owned, *before, head]),
        outer=stem,
        outputs=[plain] * depth,
        copy_input=[None] * depth,
        copy_state=[False] * (depth + 1),
        traced=False,
    )


def refuse_wrappers(model: Any) -> None:
    """Raise ValueError for what is no module, ChainError for what hides its blocks."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give an nn.Module.")
    for module in model.modules():
        reason = _REFUSED.get(type(module).__name__)
        if reason and (module is model or type(module).__name__ != "OptimizedModule"):
            raise ChainError(f"model: {type(module).__name__} is no chain; {reason}.")
        if getattr(module, "gradient_checkpointing", False) is True:
            raise ChainError(
                f"model: {type(module).__name__} has gradient checkpointing on, which runs blocks a second time behind "
                "the schedule's back: switch it off (gradient_checkpointing_disable(), in newer transformers "
                "activation_checkpointing_disable()) and plan with recompute=1 instead."
            )


def checked_run(model: nn.Module, batch: Any, compute: ComputeLoss) -> Callable[[], Tensor]:
    """``compute`` on the batch, with the model's own complaints turned into one clear error."""

    def run() -> Tensor:
        try:
            return compute(model, batch)
        except (ValueError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
            shapes = [tuple(t.shape) for t in tensors(batch)]
            raise ValueError(
                f"batch: {type(model).__name__} rejected a {type(batch).__name__} of tensors {shapes}: "
                f"{type(error).__name__}: {error}"
            ) from error

    return run


def _alike(blocks: Sequence[nn.Module]) -> bool:
    """Whether all blocks have one architecture: classes, plain attributes and parameter shapes."""

    def architecture(block: nn.Module) -> list[Any]:
        plain = (bool, int, float, str, tuple)
        return [
            (
                type(m),
                {k: v for k, v in vars(m).items() if isinstance(v, plain)},
                [p.shape for p in m._parameters.values() if p is not None],
            )
            for m in block.modules()
        ]

    first = architecture(blocks[0])
    return all(architecture(block) == first for block in blocks[1:])
