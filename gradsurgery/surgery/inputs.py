"""Updates kept off the inputs that layers have seen: OWM and the null space of features."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery.batch import Loss, batch_size, map_batch, per_sample_losses
from gradsurgery.capture import tape
from gradsurgery.ops._inputs import check
from gradsurgery.surgery.rule import one_of


class InputProjection:
    """What a step of new data may change of a model, for outputs on data observed to stay.

    A weight W that multiplies inputs x changes what it gives for them by ΔW x. The update of each
    linear layer and convolution is multiplied by a projector P made of the inputs observed, so that
    ΔW P x is small for these. Give one to `Surgeon(project=...)`, or call it on an update. It is
    the gradient that is kept off: weight decay and momentum from before move outputs all the same.

    Args:
        model: the model whose layers are meant, by the names of its parameters.
        others: what happens to parameters that multiply no inputs (biases, norms, embeddings,
            grouped convolutions): "freeze" holds them, without which outputs move; "leave" not.
    """

    def __init__(self, model: nn.Module, others: Literal["freeze", "leave"] = "freeze") -> None:
        check(isinstance(model, nn.Module), f"model must be a Module, got {type(model).__name__}")
        one_of("others", others, ("freeze", "leave"))
        self.model, self.others = model, others
        self._seen: dict[str, tuple[int, Tensor]] = {}
        self._projectors: dict[str, Tensor] = {}

    def observe(self, batch: Any, loss: Loss) -> None:
        """Remember the inputs of all layers on a batch; costs a forward and a backward pass.

        Args:
            batch: any pytree of tensors, leading dimension B.
            loss: (model, batch) -> per-sample losses [B]: decides only which layers are reached.
        """
        size = count = batch_size(batch)
        if size == 1:  # the gradient of one sample alone is formed and not kept as tokens
            batch, size = map_batch(lambda leaf: torch.cat([leaf, leaf]), batch), 2
        with torch.enable_grad(), tape(self.model) as recorder:
            jacobian = recorder.jacobian(per_sample_losses(loss(self.model, batch), size))
        for name, found in zip(jacobian.names, jacobian.input_moments(), strict=True):
            if found is not None:
                _, before = self._seen.get(name, (found.dim, torch.zeros_like(found.matrix)))
                self._seen[name] = found.dim, before + found.matrix * (count / size)
        self._projectors = {}

    def __call__(self, names: list[str], update: list[Tensor]) -> list[Tensor]:
        """An update, shaped like the parameters of these names, off the inputs observed.

        Before anything is observed, it is what it was.
        """
        return [
            self._project(name, part) if self._seen else part
            for name, part in zip(names, update, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {name: (dim, matrix.clone()) for name, (dim, matrix) in self._seen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = dict(self.model.named_parameters())
        for name in state:
            check(name in known, f"state is of a parameter {name}, which the model has not")
        self._seen = {name: (dim, matrix.clone()) for name, (dim, matrix) in state.items()}
        self._projectors = {}

    def _project(self, name: str, part: Tensor) -> Tensor:
        if name not in self._seen:
            return torch.zeros_like(part) if self.others == "freeze" else part
        dim, matrix = self._seen[name]
        if name not in self._projectors:
            values, vectors = torch.linalg.eigh(matrix)
            self._projectors[name] = (vectors * self._share(values.clamp_min(0))) @ vectors.mT
        projector = self._projectors[name].to(part.device)
        plane = part.reshape(part.shape[0], -1).double()
        plane = projector @ plane if dim == 0 else plane @ projector
        return plane.to(part.dtype).view(part.shape)

    def _share(self, values: Tensor) -> Tensor:
        """Of each eigenvector of the inputs' second moments, what P leaves of it."""
        raise NotImplementedError


class OWM(InputProjection):
    """P = (1 + Σ x xᵀ / alpha)⁻¹ over all inputs observed.

    The paper's recursion P ← P - k kᵀ / (alpha + xᵀ k), k = P x, one input at a time, in one go:
    the same by the Sherman-Morrison formula.

    Args:
        alpha: above 0: the smaller, the less is left along inputs observed.

    Continual Learning of Context-Dependent Processing in Neural Networks, Zeng et al. 2018
    (arXiv:1810.01256).
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 1e-3,
        others: Literal["freeze", "leave"] = "freeze",
    ) -> None:
        super().__init__(model, others)
        check(alpha > 0, f"alpha must be above 0, got {alpha}")
        self.alpha = alpha

    def _share(self, values: Tensor) -> Tensor:
        return self.alpha / (self.alpha + values)


class NullSpace(InputProjection):
    """P projects on the directions in which the inputs observed have next to nothing.

    Args:
        rtol: eigenvectors of Σ x xᵀ are left where their eigenvalue is at most rtol times the
            largest, in [0, 1).

    Training Networks in Null Space of Feature Covariance for Continual Learning, Wang et al. 2021
    (arXiv:2103.07113).
    """

    def __init__(
        self,
        model: nn.Module,
        rtol: float = 1e-3,
        others: Literal["freeze", "leave"] = "freeze",
    ) -> None:
        super().__init__(model, others)
        check(0 <= rtol < 1, f"rtol must be in [0, 1), got {rtol}")
        self.rtol = rtol

    def _share(self, values: Tensor) -> Tensor:
        # an eigenvalue of zero comes out as rounding of the largest
        limit = max(self.rtol, 4 * len(values) * torch.finfo(values.dtype).eps) * values.max()
        return (values <= limit).to(values.dtype)
