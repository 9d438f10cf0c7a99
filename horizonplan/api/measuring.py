"""What a job's process does: make the model and its data, plan, and say what came of it."""

import importlib
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from horizonplan.api.architectures import RANDOM_DATA, JobRequest, RegisteredModel, check_parameters, random_batches
from horizonplan.api.job_settings import JobSettings
from horizonplan.api.schemas import cost_of, objective_of
from horizonplan.batch import as_loader
from horizonplan.curves import PoorFitWarning
from horizonplan.objective import InfeasibleError
from horizonplan.planner import plan_horizon
from horizonplan.probes.child import out_of_memory
from horizonplan.units import format_bytes

_ROLLOUT_STEPS = 50  # with real data, unless asked otherwise


def measure(letter: dict[str, Any], say: Callable[..., None]) -> None:
    """Do a job.

    Args:
        letter: ``request`` and ``settings`` as JSON texts.
        say: called with ``progress={message, done, total}`` at each stage, at the end with ``plan`` or ``error``.
    """
    settings = JobSettings.model_validate_json(letter["settings"])
    torch.set_num_threads(settings.threads)

    def report(message: str, done: int, total: int) -> None:
        say(progress={"message": message[:200], "done": done, "total": total})

    try:
        say(plan=_plan(JobRequest.model_validate_json(letter["request"]), settings, report))
    except Exception as error:
        traceback.print_exc()
        say(error={"kind": _kind(error), "message": _words(error, settings)})


def _plan(asked: JobRequest, settings: JobSettings, report: Callable[[str, int, int], None]) -> dict[str, Any]:
    report("make the model", 0, 4)
    registered = isinstance(asked.architecture, RegisteredModel)
    model, data = _registered(asked, settings) if registered else _sized(asked, settings)
    rollout_steps = asked.options.rollout_steps
    if rollout_steps is None:
        rollout_steps = _ROLLOUT_STEPS if registered else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorFitWarning)  # the plan's notes say it too
        plan = plan_horizon(
            model,
            data,
            objective=objective_of(asked.objective),
            cost=cost_of(asked.cost),
            rollout_steps=rollout_steps,
            horizons=asked.options.horizons,
            batches=asked.options.batches,
            device=asked.device,
            seed=asked.seed,
            progress=report,
            probe_steps=asked.options.probe_steps,
        )
    told = () if registered or asked.simulated else (RANDOM_DATA,)
    return replace(plan, notes=(*plan.notes, *told)).to_dict()


def _sized(asked: JobRequest, settings: JobSettings) -> tuple[nn.Module, Any]:
    architecture = asked.architecture
    assert not isinstance(architecture, RegisteredModel)
    check_parameters(asked, settings)
    data = random_batches(architecture.batch, asked.batch_size or 32, asked.options.batches, asked.seed)
    torch.manual_seed(asked.seed)
    with torch.device("meta" if asked.simulated else "cpu"):
        return architecture.model(), data


def _registered(asked: JobRequest, settings: JobSettings) -> tuple[nn.Module, Any]:
    assert isinstance(asked.architecture, RegisteredModel)
    registered = settings.models[asked.architecture.id]
    data = _made(registered.data)
    if isinstance(data, tuple) and len(data) == 2:
        data = data[0]  # the other is to validate on
    if asked.batch_size is not None and not isinstance(data, Dataset):
        raise ValueError(f"batch_size={asked.batch_size}: the data of {asked.architecture.id!r} are batches already")
    loader = as_loader(data, asked.batch_size or 32, shuffle=True, seed=asked.seed)
    torch.manual_seed(asked.seed)
    model = _made(registered.model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{registered.model!r} returned a {type(model).__name__}; let it return an nn.Module")
    return model, loader


def _made(spec: str) -> Any:
    """What an operator's function returns."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)()


def _kind(error: Exception) -> str:
    if isinstance(error, InfeasibleError):
        return "infeasible"
    if _starved(error):
        return "out-of-memory"
    return "invalid" if isinstance(error, ValueError | FloatingPointError) else "fault"


def _starved(error: BaseException | None) -> bool:
    """Whether memory ran out, be it as the cause of what is told."""
    return error is not None and (out_of_memory(error) or _starved(error.__cause__))


def _words(error: Exception, settings: JobSettings) -> str:
    if _starved(error):
        return f"a job may allocate {format_bytes(settings.memory_bytes)}, and this one needs more; ask for less"
    message = " ".join(str(error).split())[:2000]
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"
