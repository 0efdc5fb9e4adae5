"""The exceptions gradsurgery raises; those about its input are ValueErrors."""

from collections.abc import Sequence


class InputError(ValueError):
    """An argument has the wrong type, shape, dtype or device; the message names it."""


class NonFiniteError(InputError):
    """A row holds a NaN or an infinity; the message names the row."""


class CoupledSamplesError(InputError):
    """Losses of different samples depend on each other, so they have no rows of their own.

    Attributes:
        operation: what computes across samples: operations of autograd, such as
            "NativeBatchNormBackward0", separated by commas, or a hook, described.
        parameters: names of those below it, whose rows are missing.
        modules: names of batch norms in training mode, where the operation is theirs.
    """

    def __init__(
        self,
        message: str,
        operation: str = "",
        parameters: Sequence[str] = (),
        modules: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.operation = operation
        self.parameters, self.modules = tuple(parameters), tuple(modules)


class PositionError(InputError, TypeError):
    """Arguments by position that only their names may give; the message has the names."""


class MissingPackageError(InputError, ModuleNotFoundError):
    """An optional package is not installed; the message has the extra that brings it."""


class TrainingError(RuntimeError):
    """A run that cannot go on: the loss or the model stopped being finite."""


class RankError(RuntimeError):
    """Another rank of torch.distributed raised an error; the message has its number and its words.

    Where that is an `InputError` or a `NonFiniteError`, all ranks raise one of that class.
    """
