"""What the commands share: options, and errors as one line on standard error."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from horizonplan.cli.spec import DATA, MODELS, OPTIMIZERS

MODEL = f"module:function that returns an nn.Module, or one for images of ten classes: {', '.join(MODELS)}."
DATA_HELP = (
    "module:function that returns a DataLoader, a list of batches, a Dataset, or a pair of these, the second to "
    f"validate on; or {', '.join(DATA)}."
)
OPTIMIZER = f"{', '.join(OPTIMIZERS)}, or module:function from parameters to an Optimizer."
RATE = f"Learning rate of {', '.join(f'{name} ({rate:g})' for name, (_, rate) in OPTIMIZERS.items())}."
BLOCKS = "Pattern of the blocks' names ('encoder.layer.*') or their container's name. Default: found in the model."
DEVICE = (
    "Where to run: cpu, cuda, cuda:1; emulated:40MiB, the CPU with so much memory; for plan also simulated:24GiB, a "
    "card that is not there. Default: where the model is."
)
CALIBRATION = "What the card takes besides tensors, from `horizonplan doctor --calibrate`. Default: an assumption."

Model = Annotated[str, Argument(metavar="MODEL", help=MODEL)]
Data = Annotated[str, Option(help=DATA_HELP)]
Blocks = Annotated[str | None, Option(help=BLOCKS)]
OptimizerName = Annotated[str, Option("--optimizer", help=OPTIMIZER)]
LearningRate = Annotated[float | None, Option("--lr", help=RATE)]
BatchSize = Annotated[int | None, Option(min=1, help="Samples a batch, where the data are a Dataset. Default: 32.")]
Device = Annotated[str | None, Option(help=DEVICE)]
Stride = Annotated[int | None, Option(help="Blocks between windows, 1 (default) to HORIZON (disjoint).")]
Recompute = Annotated[int | None, Option(help="Activation checkpointing every so many blocks.")]
CalibrationFile = Annotated[Path | None, Option("--calibration", help=CALIBRATION)]
Loss = Annotated[str | None, Option(help="module:function from output and target to a scalar. Default: by the data.")]
Seed = Annotated[int, Option(help="Seed of all that is random, the model's weights included.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]


def in_one_line(command: Callable[..., None], code: int = 1) -> Callable[..., None]:
    """Turn a command's errors into one line and an exit code; with its option ``--debug`` they pass unchanged."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if options["debug"]:
                raise
            typer.echo(f"error: {_in_words(error)}", err=True)
            raise typer.Exit(code) from error

    return run


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | FloatingPointError | ImportError | OSError):
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    typer.echo(json.dumps(value, indent=2))


def exclude(**values: object) -> None:
    """Refuse options that exclude each other; None stands for one that is not given."""
    names = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is not None]
    if len(names) > 1:
        raise typer.BadParameter(f"{' and '.join(names)} exclude each other; give one")
