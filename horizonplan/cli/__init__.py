"""The command line: ``horizonplan plan | train | fits | tune | reproduce | serve | doctor``, one file a command."""

import gc
import warnings

import typer

from horizonplan.cli import doctor, fits, plan, reproduce, serve, train, tune
from horizonplan.cli.options import in_one_line

__all__ = ["app", "main"]

app = typer.Typer(
    help="Plan how far ahead each block's gradient looks, see what fits a card, then train with the plan.",
    epilog="`horizonplan COMMAND --help` explains a command. Exit codes: 0 done, 1 an error, 2 wrong usage.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (plan.plan, train.train, tune.tune, reproduce.reproduce, serve.serve, doctor.doctor):
    app.command()(in_one_line(command))
app.command()(in_one_line(fits.fits, code=2))  # 1 is its answer that the step does not fit


def main() -> None:
    """Run the command line of this process."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    gc.freeze()  # the probes collect garbage often: what is imported by now is none
    app(prog_name="horizonplan")
