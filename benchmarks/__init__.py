"""What this system is measured with: `paceline bench`, and scripts that answer one question each."""


class BenchmarkError(Exception):
    """A measurement cannot be made, or means nothing; the message ends with the way out."""
