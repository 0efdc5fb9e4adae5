"""torchjd's autogram interface: the Gramian of any output, from one backward pass, unhooked."""

import torch
from torch import Tensor, nn

from gradsurgery.capture.tape import Tape
from gradsurgery.jacobian import trainable
from gradsurgery.ops._inputs import check


class Engine:
    """Stands in for `torchjd.autogram.Engine`; needs no torchjd.

    Nothing is put on the modules: the Gramian is read from the graph of the output, so modules may
    share parameters, contain each other, go unused, or have their parameters used by others.

    Example:
        >>> engine = Engine(model)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> losses.backward(weighting(engine.compute_gramian(losses)))

    Args:
        modules: their parameters that require gradients make the columns, shared ones once.
        batch_dim: the dimension of the output that runs over samples, which must not depend on
            each other: what computes across them, such as batch normalization in training mode,
            is refused by name. None if they may: exact as well, but a backward pass per row, and
            a warning, for the parameters below such operations.
    """

    def __init__(self, *modules: nn.Module, batch_dim: int | None = 0) -> None:
        check(len(modules) > 0, "modules is empty")
        for k, module in enumerate(modules):
            got = type(module).__name__
            check(isinstance(module, nn.Module), f"modules[{k}] must be a Module, got {got}")
        check(
            batch_dim is None or (isinstance(batch_dim, int) and not isinstance(batch_dim, bool)),
            f"batch_dim must be an int or None, got {batch_dim!r}",
        )
        self._model = modules[0] if len(modules) == 1 else nn.ModuleList(modules)
        self._batch_dim = batch_dim

    def compute_gramian(self, output: Tensor, /) -> Tensor:
        """Inner products of the gradients of the output's elements, [m, m] for m elements.

        Rows are in the order of `output.flatten()`; dtype and device are the output's. The graph
        is kept, for `output.backward(weights)`.

        Args:
            output: losses or anything else of the forward pass, in any shape, not reduced over
                samples; made before or after the engine.

        Raises:
            InputError: no parameter of the modules is trainable or in the graph; no dimension
                batch_dim; samples that depend on each other (unless batch_dim is None).
            NonFiniteError: a row with NaN or infinity; the message names row and parameter.
        """
        check(isinstance(output, Tensor), f"output must be a Tensor, got {type(output).__name__}")
        dim, coupled, rows = self._batch_dim, "exact", None
        if dim is not None:
            check(
                -output.dim() <= dim < output.dim(),
                f"output must have a dimension batch_dim={dim}, got {list(output.shape)}; "
                "batch_dim=None is for outputs without samples",
            )
            coupled = "refuse"
            if dim % output.dim() > 0:  # samples first, rows in the order they came
                rows = torch.arange(output.numel(), device="cpu").view(output.shape).movedim(dim, 0)
                output = output.movedim(dim, 0)
        tape = Tape(self._model, trainable(self._model), coupled)
        jacobian = tape.jacobian(output, rows, retain_graph=True)
        return jacobian.gramian().to(output)


__all__ = ["Engine"]
