"""The error that ends a row, but not its job."""

from ...io.errors import readable


class RowError(ValueError):
    """A row that cannot be processed; the job continues without it.

    The message is made short and printable, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(readable(message))
