"""The error of examples."""


class DataError(ValueError):
    """Examples that cannot be read or used; the message names the remedy."""
