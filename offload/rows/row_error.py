"""What ends a row, and not its job."""

from ...io.errors import readable


class RowError(ValueError):
    """A row that nothing can be made of; the job goes on without it. Whatever of it the
    message quotes, it is short and can be printed."""

    def __init__(self, message: str) -> None:
        super().__init__(readable(message))
