"""The exceptions gradsurgery raises about its input; both are ValueErrors."""


class InputError(ValueError):
    """An argument has the wrong type, shape, dtype or device; the message names it."""


class NonFiniteError(InputError):
    """A row holds a NaN or an infinity; the message names the row."""
