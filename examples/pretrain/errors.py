"""The one error that a user of the example is meant to read."""


class UsageError(Exception):
    """An option, a path or a checkpoint that can't be used; the message says which, why and what to do."""
