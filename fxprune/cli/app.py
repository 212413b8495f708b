"""The program: its verbs, and what becomes of an error.

Exit codes: 0 done, 1 the budget can't be met, 2 wrong use, 3 a bug. Only a bug gives a traceback.
"""

import logging
import traceback
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import fxprune
from fxprune.cli import apply, bench, diff, export, inspect, prune
from fxprune.cli.malloc import keep_freed_memory
from fxprune.cli.say import print_error, print_note
from fxprune.errors import BudgetError, FxpruneError

OTHERS = r"(torch|torchvision|timm|onnx|onnxscript)(\.|$)"  # whose own warnings are kept out

HELP = """Prune the channels of neural networks by rewriting their torch.fx graphs.

A MODEL is torchvision:NAME, timm:NAME, package.module:factory, path/to/file.py:factory, or a model.safetensors that
fxprune wrote. Exit codes: 0 done, 1 the budget can't be met, 2 wrong use, 3 a bug."""


class Verbs(TyperGroup):
    """Says in one line what went wrong."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except BudgetError as error:
            print_error(error)
            raise typer.Exit(1) from None
        except FxpruneError as error:
            print_error(error)
            raise typer.Exit(2) from None
        except Exception as error:
            if isinstance(error, (typer.Abort, BrokenPipeError)) or hasattr(error, "exit_code"):  # typer's own ways out
                raise
            traceback.print_exc()
            print_error(RuntimeError("this is a bug in fxprune, or in the model; please report it"))
            raise typer.Exit(3) from None


app = typer.Typer(
    name="fxprune",
    help=HELP,
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def show_version(asked: bool) -> None:
    """Print the version, and end."""
    if asked:
        typer.echo(f"fxprune {fxprune.__version__}")
        raise typer.Exit


@app.callback()
def list_options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """The options of the program itself."""


for verb in (inspect.inspect, prune.prune, apply.apply, bench.bench, export.export, diff.diff):
    app.command()(verb)


def main() -> None:
    """The program, in a process of its own."""
    keep_freed_memory()
    warnings.filterwarnings("ignore", module=OTHERS)
    for name in ("torch", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = show_warning  # type: ignore[assignment]
    app()


def show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as what it says, without the line of code that it is from."""
    print_note(f"warning: {message}")
