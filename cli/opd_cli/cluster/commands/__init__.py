"""`opd` in a cluster: a file per concern."""

import typer

from opd_cli.cluster.commands import edit, events, get_student, logs, status, submit, wait

_PANEL = "In a cluster"


def register(app: typer.Typer) -> None:
    """Add the commands to `opd`."""
    for command in (
        *(submit.submit, status.status, logs.logs, events.events, wait.wait),
        *(edit.suspend, edit.resume, edit.promote, edit.rollback, edit.delete, get_student.get_student),
    ):
        name = command.__name__.replace("_", "-")
        app.command(name, no_args_is_help=command is not status.status, rich_help_panel=_PANEL)(command)
