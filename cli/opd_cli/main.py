"""The command `opd`. Command modules import torch only inside their functions: `opd --help` takes a blink."""

import errno
import os
import sys
import traceback
from importlib.metadata import version as installed_version
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer
from opd_core.errors import OPDError
from opd_core.exit_codes import ExitCode

from opd_cli import ablate, evaluate, generate, models, run, serve, teach, validate
from opd_cli.cluster import commands as cluster
from opd_cli.terminal import echo

_STORAGE_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_DEBUG = "--debug"
# click's; which package it is in depends on typer's version.
_UsageError: Any = typer.BadParameter.__bases__[0]
_EXIT_CODES = ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode)

app = typer.Typer(no_args_is_help=True, epilog=f"Exit codes: {_EXIT_CODES}.", pretty_exceptions_enable=False)
app.command("run")(run.run)
app.command("teach", no_args_is_help=True)(teach.teach)
app.command("ablate", no_args_is_help=True)(ablate.ablate)
app.command("validate", no_args_is_help=True)(validate.validate)
app.command("serve", no_args_is_help=True)(serve.serve)
app.command("generate", no_args_is_help=True)(generate.generate)
app.command("eval", no_args_is_help=True)(evaluate.evaluate)
app.add_typer(models.app, name="models")
cluster.register(app)


def _show_version(asked: bool) -> None:
    if asked:
        echo(f"opd {installed_version('diffusion-opd')}")
        raise typer.Exit


@app.callback()
def opd(
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show the stack trace of an error; before or after the command.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Distil several teachers of a text-to-image diffusion model into one student, and serve it.

    Example: opd run examples/tiny/quickstart.yaml
    """


def main() -> None:
    """Entry point: an error becomes one message and its exit code."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    sys.excepthook = _show_defect
    # Who wants a stack trace has just seen an error, and adds the option to the end of the line.
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    debug = _DEBUG in sys.argv[:end]
    words = [word for i, word in enumerate(sys.argv) if i and (word != _DEBUG or i > end)]
    try:
        sys.exit(app(args=words, standalone_mode=False))
    except _UsageError as error:
        message = (
            " ".join(error.format_message().split())
            .rstrip(".")
            .replace("Value error, ", "")
            .replace("Input should", "should")
        )
        if not message:  # a command without its arguments: its help has been shown
            sys.exit(int(ExitCode.INVALID))
        command = error.ctx.command_path if error.ctx else "opd"
        _fail(f"{message}; `{command} --help` shows more", ExitCode.INVALID)
    except typer.Abort:
        sys.exit(int(ExitCode.INTERRUPTED))
    except OPDError as error:
        if debug:
            echo(traceback.format_exc(), err=True)
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("opd_"):
            raise
        _fail(f"{error.name} is missing; in the checkout: pip install '.[trainer,serving]'", ExitCode.INVALID)
    except OSError as error:
        if error.errno not in _STORAGE_FAILURES:
            raise
        _fail(f"{error}; make room, or choose another folder", ExitCode.STORAGE)


def _fail(message: str, code: ExitCode) -> NoReturn:
    echo(f"error: {message}", err=True)
    sys.exit(int(code))


def _show_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A stack trace quotes what somebody else has said, too."""
    echo("".join(traceback.format_exception(kind, error, trace)), err=True)


if __name__ == "__main__":
    main()
