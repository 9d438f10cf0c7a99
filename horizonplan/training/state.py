"""What a checkpoint holds: everything that a run's future depends on."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.algorithms import Algorithm
from horizonplan.plan import Plan
from horizonplan.probes.budget import on_host
from horizonplan.training import checkpoint
from horizonplan.training.checkpoint import Checkpoint, CheckpointError
from horizonplan.training.log import read
from horizonplan.training.run import Run
from horizonplan.training.team import Team

FOLDER = "checkpoints"
WEIGHTS = "model.safetensors"


def save(run: Run, stream: dict[str, Any] | None = None) -> Path | None:
    """Write a checkpoint of a run into its folder; returns where.

    Rank 0 writes. Random numbers and the place in the data are those of every process; buffers are rank 0's, which
    all have from then on.

    Args:
        run: the run, which is at the same step on all processes.
        stream: where this process is in the data; ``None``: where it is now.

    Raises:
        CheckpointError: (on all processes) it cannot be written; the last one is intact.
    """
    team = run.stepper.team
    run.gather()
    team.alike([*run.model.buffers(), *run.extra.buffers()])
    streams = _gathered(team, run.stream.state_dict() if stream is None else stream)
    if run.run_dir is not None:
        run.saved = team.at_first(lambda: _write(run, streams), CheckpointError)
    return run.saved


def _gathered(team: Team, stream: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process gives; as files, because pickle cannot carry tensors of uint32, which NumPy's states have."""
    if team.world == 1:
        return [stream]
    with on_host():
        own = io.BytesIO()
        torch.save(stream, own)
        return [torch.load(io.BytesIO(data), weights_only=True) for data in team.gather(own.getvalue())]


def _write(run: Run, streams: list[dict[str, Any]]) -> Path:
    assert run.run_dir is not None
    state = _state(run) | {"streams": streams}
    meta = {"settings": run.settings, "log_bytes": run.log.sync(), "versions": _versions()}
    with on_host():
        path = checkpoint.save(run.run_dir / FOLDER, run.step, dict(_weights(run)), state, meta)
    run.log.event("save", step=run.step, path=path.name)
    run.call("on_save", path)
    return path


def find(where: Path, team: Team | None = None) -> Checkpoint | None:
    """The newest valid checkpoint of a run's folder, or the one whose own folder it is.

    In a team it is the one that rank 0 finds, read by every process; all have to see the same files.

    Raises:
        CheckpointError: it is a checkpoint's own folder and damaged, or all of a run's are.
    """
    found: list[Checkpoint | None] = []

    def first() -> Path | None:
        found.append(checkpoint.load(where) if where.parent.name == FOLDER else checkpoint.latest(where / FOLDER))
        if found[0] is None and (damaged := checkpoint.present(where / FOLDER)):
            raise CheckpointError(
                f"{where}: none of its {len(damaged)} checkpoints is valid, so the run cannot go on; start afresh in "
                "another folder."
            )
        return None if found[0] is None else found[0].path

    with on_host():
        path = (team or Team()).at_first(first, CheckpointError)
        if path is None:
            return None
        return found[0] if found else checkpoint.load(path)


def occupied(folder: Path) -> bool:
    """Whether there is a run in a folder that is worth something: checkpoints, whatever their state, or weights."""
    return bool(checkpoint.present(folder / FOLDER)) or (folder / WEIGHTS).exists()


def restore(run: Run, found: Checkpoint) -> None:
    """Bring a run to where a checkpoint was written. Its log is read by :func:`history`.

    Raises:
        ValueError: the checkpoint is of another model, method or setting.
    """
    then, now = found.meta["settings"], run.settings
    for name in now:
        if then.get(name) != now[name]:
            was, has = _difference(then.get(name), now[name])
            raise ValueError(
                f"resume: {found.path} was made with {name}={was}, this run has {has}; set it as it was, or start "
                "afresh in another folder."
            )
    restore_weights(run, found)
    for name, part in _parts(run).items():
        part.load_state_dict(found.state[name])
    own = found.state["run"]
    run.epoch, run.step, run.thrift, run.faults = own["epoch"], own["step"], own["thrift"], own["faults"]
    left = list(found.state["callbacks"])
    for callback in _keepers(run):  # one that is new begins afresh
        state = next((state for state in left if state[0] == type(callback).__name__), None)
        if state is not None:
            left.remove(state)
            callback.load_state_dict(state[1])
    run.stream.load_state_dict(found.state["streams"][run.rank])
    run.resumed = True


def restore_weights(run: Run, found: Checkpoint) -> None:
    """Bring model, optimiser and method to where they were; not the learning rate and other settings of groups.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    _adopt(run.model, "model", found.weights)
    own = dict(_weights(run))
    if own.keys() != found.weights.keys():
        odd = sorted(own.keys() ^ found.weights.keys())
        raise ValueError(f"resume: {found.path} is of another model: {odd[0]!r} is in one of them only.")
    with torch.no_grad():
        for name, value in own.items():
            if value.shape != found.weights[name].shape:
                shapes = f"{tuple(found.weights[name].shape)} there, {tuple(value.shape)} here"
                raise ValueError(f"resume: {found.path} is of another model: {name!r} is {shapes}.")
            value.copy_(found.weights[name])
    for name, module in run.model.named_modules():
        if name in found.state["extra"]:
            module.set_extra_state(found.state["extra"][name])
    _restore_optimizer(run, found)
    for method, state in zip(run.methods.values(), found.state["methods"], strict=True):
        method.load_state_dict(state)


def _adopt(model: nn.Module, prefix: str, weights: Mapping[str, Tensor]) -> None:
    """Make the buffers that a model has only after its first forward."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            value = weights.get(".".join(filter(None, (prefix, path, name))))
            if buffer is None and value is not None:
                device = next((p.device for p in model.parameters()), value.device)
                module._buffers[name] = value.to(device, copy=True)


def _restore_optimizer(run: Run, found: Checkpoint) -> None:
    """The optimiser's state; its groups' settings too, unless the run is under way and has its own by now."""
    optimizer = run.optimizer
    now = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(found.state["optimizer"])
    except ValueError as error:
        raise ValueError(
            f"resume: the optimizer had other parameter groups when {found.path} was written ({error}); make the same "
            "ones at the start (those that a callback adds later cannot be resumed)."
        ) from error
    if run.step > 0:
        for group, settings in zip(optimizer.param_groups, now, strict=True):
            group.update(settings)
    optimizer._opt_called = True  # type: ignore[attr-defined]  # it was, before; schedulers warn without it


def history(run: Run, events: list[dict[str, Any]]) -> None:
    """Restore the run's history from its log."""
    for event in events:
        values = {name: value for name, value in event.items() if name not in ("time", "event")}
        if event["event"] == "step":
            run.history.append({name: values[name] for name in ("epoch", "step", "loss")})
            run.seconds.append(values["seconds"])
        elif event["event"] == "memory" and values["step"] > 0:
            run.watch.peak_bytes = max(run.watch.peak_bytes, values["peak_bytes"])
        elif event["event"] == "validation":
            run.validations.append(values)


def log_of(found: Checkpoint) -> list[dict[str, Any]]:
    """The events before a checkpoint, from the log in its run's folder.

    Raises:
        CheckpointError: there is no such log, or not all of it.
    """
    return read(found.path.parent.parent, found.meta["log_bytes"])


def settings(run: Run) -> dict[str, Any]:
    """What must be the same in a resumed run for it to be the same run."""
    stepper = run.stepper
    return {
        "plan": None if run.plan is None else _hash(run.plan),
        "algorithm": {str(epoch): _in_words(method) for epoch, method in run.methods.items()},
        "optimizer": type(run.optimizer).__name__,
        "optimizer settings": [_plain(group) for group in run.optimizer.param_groups],
        "scheduler": None if run.scheduler is None else type(run.scheduler).__name__,
        "scheduler settings": None if run.scheduler is None else _plain(run.scheduler.state_dict()),
        "precision": stepper.precision,
        "accumulate": stepper.accumulate,
        "max_grad_norm": stepper.max_grad_norm,
        "processes": stepper.team.world,
    }


def _state(run: Run) -> dict[str, Any]:
    return {
        "optimizer": run.optimizer.state_dict(),
        "methods": [method.state_dict() for method in run.methods.values()],
        "callbacks": [[type(callback).__name__, callback.state_dict()] for callback in _keepers(run)],
        "extra": {
            name: module.get_extra_state()
            for name, module in run.model.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        },
        "run": {
            "epoch": run.epoch,
            "step": run.step,
            "thrift": run.thrift,
            "faults": run.faults,
        },
    } | {name: part.state_dict() for name, part in _parts(run).items()}


def _parts(run: Run) -> dict[str, Any]:
    parts = {"scheduler": run.scheduler, "scaler": run.stepper.scaler}
    return {name: part for name, part in parts.items() if part is not None}


def _keepers(run: Run) -> list[Any]:
    """The callbacks that have a state."""
    return [c for c in run.callbacks if hasattr(c, "state_dict") and hasattr(c, "load_state_dict")]


def _weights(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that no ``state_dict`` has included, each once."""
    for prefix, module in (("model", run.model), ("extra", run.extra)):
        yield from ((f"{prefix}.{name}", p) for name, p in module.named_parameters())
        yield from ((f"{prefix}.{name}", b) for name, b in module.named_buffers())


def _plain(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as words that can be compared; not parameters, and not functions, whose words are addresses."""
    known = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in settings.items()}
    return {name: repr(v) for name, v in known.items() if name != "params" and " at 0x" not in repr(v)}


def _difference(then: Any, now: Any) -> tuple[str, str]:
    """Two settings that differ, in words; of groups of settings only what differs."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        then, now = next(pair for pair in zip(then, now, strict=True) if pair[0] != pair[1])
    if isinstance(then, dict) and isinstance(now, dict):
        odd = [name for name in then.keys() | now.keys() if then.get(name) != now.get(name)]
        then, now = ({name: one[name] for name in sorted(odd) if name in one} for one in (then, now))
    return repr(then), repr(now)


def _in_words(method: Algorithm) -> str:
    return repr(method) if is_dataclass(method) else type(method).__name__


def _hash(plan: Plan) -> str:
    return hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):  # running from a bare checkout
        found["horizonplan"] = version("horizonplan")
    return found
