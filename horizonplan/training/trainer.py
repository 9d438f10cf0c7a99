"""The trainer: any PyTorch optimiser, data and model, with a plan's gradient or another method's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import nn
from torch.optim import Optimizer

from horizonplan.algorithms import Algorithm, BackPropagation, Fixed, Windows
from horizonplan.batch import as_device, as_loader, batch_size, move, resolve_loss
from horizonplan.chain import Chain
from horizonplan.chain.calls import ENTRY, rng_devices, training_mode
from horizonplan.chain.chain import refuse_wrappers
from horizonplan.devices import parse_device
from horizonplan.probes.budget import Budget
from horizonplan.probes.steady import check_optimizer, optimizer_for
from horizonplan.training import state
from horizonplan.training.attempts import Attempts
from horizonplan.training.checkpoint import Checkpoint, set_aside
from horizonplan.training.contents import write_tensors
from horizonplan.training.data import Stream
from horizonplan.training.deterministic import deterministic
from horizonplan.training.evaluate import check_metrics, rehearsed
from horizonplan.training.files import write
from horizonplan.training.log import Log
from horizonplan.training.loop import Loop
from horizonplan.training.options import Options
from horizonplan.training.precision import scaler_for
from horizonplan.training.progress import Reporter
from horizonplan.training.random_state import seeded_all
from horizonplan.training.refusals import check, check_method, check_scheduler, check_sharing, check_steps
from horizonplan.training.result import Result, result_of
from horizonplan.training.run import Run
from horizonplan.training.shared import time_limit
from horizonplan.training.signals import Asked, Terminated, terminable
from horizonplan.training.step import Stepper
from horizonplan.training.team import Team, own_device, team
from horizonplan.training.undo import Undo
from horizonplan.training.warmup import warm_up
from horizonplan.training.watch import Watch, scheduled

P = ParamSpec("P")
WHOLE = ("",)  # the name of the model itself, as the only block


@dataclass
class Trainer(Options):
    """Trains a model in place: ``Trainer(model, data, plan=plan).train()``."""

    def __post_init__(self) -> None:
        refuse_wrappers(self.model)
        check(self)

    def train(self) -> Result:
        """Train to the last epoch.

        Raises:
            ValueError: bad arguments, options that exclude each other, empty data, a model the plan was not made for.
            torch.OutOfMemoryError: a step does not fit the device, and no thriftier one was found in time.
            MemoryError: memory ran out in an update, which cannot be taken back.
            FloatingPointError: a loss or gradient is not finite; the weights are those before that step, unless they
                were updated in it (``fused``, a method that owns its step).
            CheckpointError: a checkpoint or the log could not be written, and earlier ones are intact; or there are
                checkpoints to resume from, and none is valid.
            Terminated: (a SystemExit with code 143) SIGTERM came; the run is saved in ``run_dir``.
        """
        card = parse_device(self.device)
        place = _place(self.model, "cpu" if card is not None else own_device(self.device, self.model))
        with ExitStack() as stack:
            budget = None if card is None else Budget(card.memory_bytes)
            group = stack.enter_context(team(place, time_limit(self.algorithm)))
            asked = stack.enter_context(terminable(self.run_dir is not None))
            stack.enter_context(seeded_all(self.seed + group.rank, rng_devices(self.model)))
            stack.enter_context(deterministic(self.deterministic))
            stack.enter_context(training_mode(self.model))
            for callback in self.callbacks:
                stack.callback(getattr(callback, "close", lambda: None))
            if budget is not None:
                stack.enter_context(budget)
            return self._train(place, group, asked, budget, stack)

    def _train(self, place: torch.device, group: Team, asked: Asked, budget: Budget | None, stack: ExitStack) -> Result:
        devices = rng_devices(self.model)
        loader = as_loader(self.data, shuffle=True, seed=self.seed)
        stream = Stream(loader, devices, *((0, 1) if group.layers else (group.rank, group.world)), self.seed)
        first = move(stream.sample(), place)
        val_data = None if self.val_data is None else as_loader(self.val_data, batch_size=batch_size(first) or 32)
        if budget is not None:
            budget.hold(list(self.model.parameters()), list(self.model.buffers()), batch=first)
        if self.metrics is not None:
            check_metrics(self.metrics, group.world)
        folder = None if self.run_dir is None else Path(self.run_dir).absolute()
        found = self._checkpoint(folder, group)
        run = self._run(stream, first, place, group, folder)
        compute = resolve_loss(self.loss, self.compute_loss)
        if val_data is not None:
            run.metrics = rehearsed(run.model, val_data, compute, place, self.metrics)
        stack.callback(lambda: run.log.close())
        self._begin(run, found)
        if budget is not None:
            held = list(self.model.parameters()), list(self.model.buffers()), dict(run.optimizer.state)
            budget.hold(*held, batch=first)
        stack.enter_context(_compiled(run.chain, self.compile))
        names = [*self.model.named_parameters(), *run.extra.named_parameters()]
        stack.enter_context(group.hooked(run.optimizer, names))
        report = Reporter(self.progress, self.epochs, active=group.rank == 0)
        attempts = Attempts(run, self, Undo(nn.ModuleList([self.model, run.extra]), devices))
        loop = Loop(run, self, compute, val_data, attempts, asked, report)
        done = False
        try:
            loop.train()
            done = True
        finally:
            report.close(done)
        if folder is not None and group.rank == 0:
            _save_weights(run)
        group.barrier()
        if loop.to_end():
            raise Terminated("SIGTERM came when all steps were made; the weights are saved.")
        return result_of(loop)

    def _checkpoint(self, folder: Path | None, group: Team) -> Checkpoint | None:
        """What to go on from; a run that is in the folder already is not overwritten.

        Raises:
            ValueError: there is another run in the folder, or nothing where ``resume`` points.
            CheckpointError: there are checkpoints to resume from, and none is valid.
        """
        where = folder if self.resume is True else None if not self.resume else Path(self.resume).absolute()
        elsewhere = where is None or folder not in (where, where.parent.parent)
        if folder is not None and elsewhere and any(group.gather(state.occupied(folder))):
            raise ValueError(
                f"run_dir={str(self.run_dir)!r}: there is a run in it already; go on with it by resume=True "
                "(--resume), or give another folder."
            )
        if where is None:
            return None
        found = state.find(where, group)
        if found is None and self.resume is not True:
            raise ValueError(f"resume={str(self.resume)!r}: there is no checkpoint in that folder.")
        return found

    def _run(self, stream: Stream, first: Any, place: torch.device, group: Team, folder: Path | None) -> Run:
        chain, methods = self._methods(first)
        extra = nn.ModuleList([m for method in methods.values() if (m := method.prepare(chain, first)) is not None])
        optimizer = _optimizer(self.optimizer, [*self.model.parameters(), *extra.parameters()])
        for method in methods.values():
            check_method(self, method, chain, group.world)
        if group.layers:
            check_sharing(methods.values())
        if self.cosine_every:
            for method in methods.values():
                scheduled(method, chain.depth)
        cosine_every = self.cosine_every if group.rank == 0 else 0  # its log has one
        group.waits = self.fused
        group.alike([*self.model.parameters(), *self.model.buffers(), *extra.parameters(), *extra.buffers()])
        if folder is not None and group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        stepper = Stepper(
            chain,
            optimizer,
            place,
            group,
            self.forward_precision,
            scaler_for(self.forward_precision, place),
            self.max_grad_norm,
            self.fused,
            self.accumulate,
            self.micro_batches,
        )
        run = Run(
            stepper,
            methods,
            extra,
            self._scheduler(optimizer),
            stream,
            Watch(
                chain,
                self.plan,
                lambda kind, **values: None,
                self.watch_every,
                cosine_every,
                extra,
                list(methods.values()),
            ),
            Log(),
            list(self.callbacks),
            folder,
            self.plan,
        )
        run.settings = state.settings(run) | {"scheduler_every": self.scheduler_every}
        return run

    def _methods(self, first: Any) -> tuple[Chain, dict[int, Algorithm]]:
        """The chain, and first epoch -> method."""
        if self.plan is not None:
            chain = self.plan.chain(self.model, first, self.loss, self.compute_loss, self.projection)
            methods: dict[int, Algorithm] = {0: Fixed(self.plan.schedule)}
        else:
            given = BackPropagation() if self.algorithm is None else self.algorithm
            methods = dict(sorted(given.items())) if isinstance(given, Mapping) else {0: given}
            blocks = WHOLE if self.blocks is None and all(m.whole for m in methods.values()) else self.blocks
            chain = Chain.from_model(self.model, first, blocks, self.loss, self.compute_loss, self.projection)
        for method in methods.values():
            if isinstance(method, Windows):
                method.schedule(chain.depth)
        if self.warmup:
            final = methods[0]
            if not isinstance(final, Windows):
                raise ValueError(f"warmup={self.warmup}: {final} has no horizon to grow to; set it to 0.")
            methods = warm_up(final, chain.depth, self.warmup)
        return chain, methods

    def _scheduler(self, optimizer: Optimizer) -> Any:
        scheduler = self.scheduler
        if callable(scheduler) and (isinstance(scheduler, type) or not hasattr(scheduler, "step")):
            scheduler = scheduler(optimizer)
        check_scheduler(scheduler, optimizer, self.scheduler_every)
        return scheduler

    def _begin(self, run: Run, found: Checkpoint | None) -> None:
        """Restore what there is to restore, and open the log."""
        if found is not None:
            events = state.log_of(found)
            state.restore(run, found)
            state.history(run, events)
            if run.epoch >= self.epochs:
                raise ValueError(f"epochs={self.epochs}: the run is in epoch {run.epoch} already; give more than that.")
        source = None if found is None else found.path.parent.parent
        here = source is not None and run.run_dir is not None and source.resolve() == run.run_dir.resolve()
        run.saved = found.path if found is not None and here else None
        if run.run_dir is None or run.rank > 0:
            return
        kept = 0 if found is None else found.meta["log_bytes"]
        aside = set_aside(found.path.parent, found.step) if found is not None and here else []
        if source is not None and not here:
            write(run.run_dir / "log.jsonl", (source / "log.jsonl").read_bytes()[:kept])
        run.log = Log(run.run_dir, kept)
        run.watch.tell = run.log.event
        if self.plan is not None:
            self.plan.save(run.run_dir / "plan.json")
        names = [path.name for path in aside]
        run.log.event("resume" if found else "begin", step=run.step, settings=run.settings, abandoned=names)


def _runs(trainer: Callable[P, Trainer]) -> Callable[P, Result]:
    @functools.wraps(trainer, assigned=(), updated=())
    def train(*args: P.args, **options: P.kwargs) -> Result:
        return trainer(*args, **options).train()

    return train


train = _runs(Trainer)
_ARGUMENTS = (Options.__doc__ or "").partition("\n\n")[2]
Trainer.__doc__ = f"{Trainer.__doc__}\n\n{_ARGUMENTS}"
train.__doc__ = (
    f"""Train a model in place: ``Trainer(model, data, ...).train()``; for errors see there.\n\n{_ARGUMENTS}"""
)


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is not None:
        model.to(as_device(device))
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _optimizer(optimizer: Callable[[Any], Optimizer] | Optimizer | None, parameters: list[nn.Parameter]) -> Optimizer:
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise ValueError("model: no parameter requires a gradient; unfreeze one before training.")
    if isinstance(optimizer, Optimizer):
        check_optimizer(optimizer, trainable, optimizer)
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer_for(trainable, optimizer)
    check_steps(made)
    return made


@contextmanager
def _compiled(chain: Chain, compile: bool | str | Callable[..., Any]) -> Iterator[None]:
    """Blocks compiled; afterwards they are as they were."""
    if not compile:
        yield
        return
    before = [vars(block).get(ENTRY) for block in chain.blocks]
    try:
        for block in chain.blocks:
            vars(block)[ENTRY] = _compiled_call(block, **({} if compile is True else {"backend": compile}))
        yield
    finally:
        for block, entry in zip(chain.blocks, before, strict=True):
            vars(block).pop(ENTRY, None)
            if entry is not None:
                vars(block)[ENTRY] = entry


def _compiled_call(block: nn.Module, **settings: Any) -> Callable[..., Any]:
    """A block's call, compiled; ``block.compile`` passes over modules whose forward is torch's own (nn.Sequential)."""
    own: Any = block

    def call(*args: Any, **kwargs: Any) -> Any:
        return own._call_impl(*args, **kwargs)

    return torch.compile(call, **settings)


def _save_weights(run: Run) -> None:
    """The final weights, those that are tied once."""
    assert run.run_dir is not None
    own = {name: p for name, p in run.model.state_dict(keep_vars=True).items() if isinstance(p, torch.Tensor)}
    first = {id(p): name for name, p in reversed(own.items())}
    tensors = {name: own[name] for name in first.values()}
    write(run.run_dir / state.WEIGHTS, lambda file: write_tensors(file, tensors))
