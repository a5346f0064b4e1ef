"""The error every bad record ends in: which record, what is wrong, and the way out."""


class DataError(ValueError):
    """A record, or a whole dataset, that cannot be trained on as it stands."""


class TooLongError(DataError):
    """One conversation has more tokens or patches than a packed row may hold."""
