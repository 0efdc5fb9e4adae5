"""What the slow way is taken for, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Reason = Literal["no formula", "coupled", "opaque", "hook", "not linear"]

WHY: dict[Reason, str] = {
    "no formula": "there is no formula for {}",
    "coupled": "{} computes across samples",
    "opaque": "nothing is known of {}",
    "hook": "it has a hook",
    "not linear": (
        "a hook or a Function on what is computed from them is not linear in its gradient"
    ),
}
# where the operation itself is called for each row, and where a whole backward pass is
CALLS = "so the rows are got one by one, exactly but slowly, and stored"
PASSES = "so the rows are got by a backward pass each and stored"


@dataclass(frozen=True)
class Fallback:
    """Parameters whose rows are got one at a time: exact, but slow, and stored.

    Attributes:
        operation: what autograd calls the operation, such as "EmbeddingBackward0", or a description
            of the hook; "" where neither is known.
        parameters: their names.
        reason: "no formula", of the operation; "coupled", it computes across samples; "opaque", it
            cannot be asked what it does; "hook", the parameters have hooks; "not linear", what is
            computed from the parameters passes through a hook or a Function that is not.
    """

    operation: str
    parameters: tuple[str, ...]
    reason: Reason

    @property
    def why(self) -> str:
        """The reason in words."""
        return WHY[self.reason].format(self.operation)

    def of(self, names: Sequence[str]) -> "Fallback | None":
        """The same of those of its parameters that have these names; None if there are none."""
        mine = tuple(name for name in self.parameters if name in names)
        return Fallback(self.operation, mine, self.reason) if mine else None

    def __str__(self) -> str:
        how = CALLS if self.reason in ("no formula", "not linear") else PASSES
        text = f"{', '.join(self.parameters)}: {self.why}, {how}"
        hint = compiled(self.operation) if self.reason == "no formula" else ""
        return f"{text}.{hint}" if hint else text


def compiled(operation: str) -> str:
    """What to do where a compiler has fused the operation; "" for others."""
    return " Call the compiled model inside the tape." if "CompiledFunction" in operation else ""
