"""From words on the command line to objects: a name of ours, or ``module:function`` in the user's code.

Modules are imported with the current directory importable; functions are called without arguments. Where shapes are
enough (for a card that is not there), a model is made on the device ``meta``, which allocates nothing.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset

from horizonplan.batch import as_loader, model_inputs, take, tensors
from horizonplan.datasets import digits, mnist5k
from horizonplan.devices import parse_device
from horizonplan.models import Patches, ResidualCNN, ResidualMLP, SequenceClassifier
from horizonplan.training import DecayOnGrowth


def _transformer(images: Tensor) -> nn.Module:
    patches = Patches(max(1, min(images.shape[2:]) // 4))
    length, features = patches(images).shape[1:]
    return nn.Sequential(patches, SequenceClassifier(features, length, classes=10, width=64, depth=8))


MODELS: dict[str, Callable[[Tensor], nn.Module]] = {
    "residual-mlp": lambda images: nn.Sequential(nn.Flatten(), ResidualMLP(images[0].numel(), 32, 10, depth=12)),
    "residual-cnn": lambda images: ResidualCNN(images.shape[1], channels=(8, 16, 32), blocks_per_stage=3),
    "transformer": _transformer,
}
DATA: dict[str, Callable[[], Any]] = {"digits": partial(digits, images=True), "mnist5k": mnist5k}
SCHEDULERS: dict[str, Callable[[int, Optimizer], Any]] = {
    "cosine": lambda epochs, optimizer: CosineAnnealingLR(optimizer, epochs),
    "decay-on-growth": lambda epochs, optimizer: DecayOnGrowth(optimizer),  # the paper's rule
}
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "adamw": (AdamW, 1e-3),
    "adam": (Adam, 1e-3),
    "sgd": (SGD, 1e-1),
}


def load_data(spec: str, batch_size: int | None, seed: int, shuffle: bool = False) -> tuple[Iterable[Any], Any]:
    """Batches to train on, and validation data or None.

    Raises:
        ValueError: the specification leads to no data, or to batches although a batch size is given.
    """
    data = DATA[spec]() if spec in DATA else _made("data", spec, DATA)
    training, validation = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    if batch_size is not None and not isinstance(training, Dataset):
        raise ValueError(f"--batch-size {batch_size}: the data of {spec!r} are batches already; leave it out.")
    try:
        return as_loader(training, batch_size or 32, shuffle, seed), validation
    except ValueError as error:
        raise ValueError(f"data {spec!r}: {error} A pair of these is training and validation data.") from error


def load_batch(spec: str, batch_size: int | None) -> Any:
    """One batch: what the function returns, or the first of the batches it returns (a list of tensors is one batch).

    Raises:
        ValueError: the specification leads to no tensors, or to batches although a batch size is given.
    """
    data = DATA[spec]() if spec in DATA else _made("batch", spec, DATA)
    if isinstance(data, tuple) and len(data) == 2 and _holds_batches(data[0]):
        data = data[0]  # the other is to validate on
    if batch_size is not None and not isinstance(data, Dataset):
        raise ValueError(f"--batch-size {batch_size}: {spec!r} returns whole batches; leave it out.")
    try:
        batch = take(as_loader(data, batch_size or 32), 1)[0] if _holds_batches(data) else data
    except ValueError as error:
        raise ValueError(f"batch {spec!r}: {error}") from error
    if next(tensors(batch), None) is None:
        kind = type(batch).__name__
        raise ValueError(f"batch {spec!r}: no tensor in the {kind} it returned; let it return a batch or a DataLoader.")
    return batch


def load_model(spec: str, batches: Iterable[Any], device: str | None, seed: int) -> nn.Module:
    """The model, its weights from ``seed``; one of ours has the size that the first of the batches asks for.

    For a simulated device it is made as :func:`load_shapes` does.

    Raises:
        ValueError: the specification leads to no model, or there is no such device.
    """
    card = parse_device(device)
    if card is not None and card.kind == "simulated":
        return load_shapes(spec, batches, seed)
    if card is None and device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device {device!r}: {reason}; `horizonplan doctor` lists what there is.") from error
    torch.manual_seed(seed)
    return _maker(spec, batches)()


def load_shapes(spec: str, batches: Iterable[Any], seed: int) -> nn.Module:
    """The model on ``meta``; where it cannot be made there, with values, which is said on standard error.

    It cannot where its function reads values (``.item()``), brings tensors of its own from elsewhere (numpy,
    pretrained weights), moves it to a device, or keeps tensors where no module registers them.

    Raises:
        ValueError: the specification leads to no model.
    """
    make = _maker(spec, batches)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # such as that loading weights does nothing there
            model = make()
        hidden = _hidden_tensors(model)
        if hidden is None:
            return model
        reason = f"{hidden} keeps tensors in no buffer"
    except Exception as error:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    torch.manual_seed(seed)
    model = make()
    typer.echo(f"note: model {spec!r} was made with its values, for on 'meta' it cannot be: {reason}", err=True)
    return model


def load_optimizer(spec: str, lr: float | None) -> Callable[[Any], Optimizer]:
    """The function from parameters to an optimiser.

    Raises:
        ValueError: the specification leads to none, or a learning rate is given beside a user's function.
    """
    if spec not in OPTIMIZERS:
        if lr is not None:
            raise ValueError(f"--lr {lr:g}: it is for {', '.join(OPTIMIZERS)}; {spec!r} sets its own, leave --lr out.")
        return _function("optimizer", spec, OPTIMIZERS)
    kind, usual = OPTIMIZERS[spec]
    rate = usual if lr is None else lr

    def make(parameters: Any) -> Optimizer:
        return kind(parameters, lr=rate)

    make.__name__ = f"{spec}(lr={rate:g})"  # what a plan's provenance shows
    return make


def load_maker(spec: str, batches: Iterable[Any], seed: int) -> nn.Module | Callable[..., nn.Module]:
    """The user's function that makes a model, perhaps from arguments; or one of our models.

    Raises:
        ValueError: the specification leads to neither.
    """
    return load_model(spec, batches, None, seed) if spec in MODELS else _function("model", spec, MODELS)


def load_tunable(spec: str) -> Callable[..., Optimizer]:
    """The function from parameters and a learning rate to an optimiser.

    Raises:
        ValueError: the specification leads to none.
    """
    return OPTIMIZERS[spec][0] if spec in OPTIMIZERS else _function("optimizer", spec, OPTIMIZERS)


def load_space(spec: str | None) -> Callable[[Any], Any] | None:
    """The user's function from a trial to arguments.

    Raises:
        ValueError: the specification leads to none.
    """
    return None if spec is None else _function("space", spec, ())


def load_loss(spec: str | None) -> Callable[..., Any] | None:
    """The user's function from output and target to a scalar loss.

    Raises:
        ValueError: the specification leads to none.
    """
    return None if spec is None else _function("loss", spec, ())


def load_scheduler(spec: str | None, epochs: int) -> Callable[[Optimizer], Any] | None:
    """The function from an optimiser to a scheduler of its learning rate that is stepped after each epoch.

    Raises:
        ValueError: the specification leads to none.
    """
    if spec is None:
        return None
    if spec not in SCHEDULERS:
        return _function("scheduler", spec, SCHEDULERS)
    return partial(SCHEDULERS[spec], epochs)


def _maker(spec: str, batches: Iterable[Any]) -> Callable[[], nn.Module]:
    """How to make the model. What it takes from other modules is imported by now, so not under ``meta``."""
    if spec in MODELS:
        images = model_inputs(take(batches, 1)[0])
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError(f"model {spec!r}: it takes images (B, C, H, W); give such data or a model of your own.")
        return partial(MODELS[spec], images)
    _function("model", spec, MODELS)

    def make() -> nn.Module:
        model = _made("model", spec, MODELS)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model {spec!r}: it returned a {type(model).__name__}; let it return an nn.Module.")
        return model

    return make


def _hidden_tensors(model: nn.Module) -> str | None:
    """A module's attribute that holds ``meta`` tensors inside a list, tuple or mapping; ``None``: there is none."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            registered = isinstance(value, Tensor) or attribute in ("_parameters", "_buffers", "_modules")
            if not registered and any(t.is_meta for t in tensors(value)):
                return f"{name}.{attribute}".lstrip(".")
    return None


def _holds_batches(data: Any) -> bool:
    """Whether it is something that holds batches, rather than one batch."""
    if isinstance(data, list):
        return not any(isinstance(entry, Tensor) for entry in data)
    return isinstance(data, Dataset | DataLoader) or (
        isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping | tuple | str)
    )


def _made(role: str, spec: str, names: Iterable[str]) -> Any:
    function = _function(role, spec, names)
    try:
        return function()
    except Exception as error:
        raised = f"calling it without arguments raised {type(error).__name__}: {error}"
        raise ValueError(f"{role} {spec!r}: {raised}; mend the function (--debug shows where).") from error


def _function(role: str, spec: str, names: Iterable[str]) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"{role} {spec!r}: there is no such name; give {', '.join(names)}, or module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        remedy = "install it, or run this in its folder" if missing else "mend the module (--debug shows where)"
        raised = f"importing {module_name!r} raised {type(error).__name__}: {error}"
        raise ValueError(f"{role} {spec!r}: {raised}; {remedy}.") from error
    if not hasattr(module, name):
        raise ValueError(f"{role} {spec!r}: {module_name!r} ({module.__file__}) has no {name!r}; check the spelling.")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(
            f"{role} {spec!r}: it is a {type(function).__name__}; give a function that returns the {role}."
        )
    return function  # type: ignore[no-any-return]
