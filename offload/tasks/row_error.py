"""What ends a row, and not its job."""


class RowError(ValueError):
    """A row that nothing can be made of; the job goes on without it."""
