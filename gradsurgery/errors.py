"""The exceptions gradsurgery raises; those about its input are ValueErrors."""


class InputError(ValueError):
    """An argument has the wrong type, shape, dtype or device; the message names it."""


class NonFiniteError(InputError):
    """A row holds a NaN or an infinity; the message names the row."""


class PositionError(InputError, TypeError):
    """Arguments by position that only their names may give; the message has the names."""


class TrainingError(RuntimeError):
    """A run that cannot go on: the loss or the model stopped being finite."""
