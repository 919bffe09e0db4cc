"""What `opd` prints. Text of a pod, of a log or of another server goes to a terminal only as text.

A terminal obeys control characters: they set its title, its clipboard, or write over what was there. Whoever may run a
pod chooses its last words, so everything that is printed passes `plain`, here and nowhere else.
"""

import re
from collections.abc import Iterable

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_FILE_WIDTH = 200
# C0 but tab and line feed, DEL, C1; what turns the direction of writing; line ends of Unicode's own; lone surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` with U+FFFD for every character that a terminal would obey; tab and line feed stay."""
    return _CONTROL.sub("\ufffd", text)


def echo(text: str = "", *, err: bool = False) -> None:
    """A line on standard output, or on standard error."""
    typer.echo(plain(text), err=err)


class _Console(Console):
    """Colours and movements of the cursor are rich's own segments; the text in them is everybody's."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))


def make_console() -> Console:
    """Where there is no terminal nothing wraps: a line stays a line, a table row stays a row."""
    console = _Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else _Console(highlight=False, soft_wrap=True, width=_FILE_WIDTH)
