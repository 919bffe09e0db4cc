"""Options that several commands have."""

from typing import Annotated

import typer

Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="One value in place of the file's, as training.rounds=10; YAML; repeatable.",
    ),
]
