# what the module says of itself; operators take tensors by position and are typed in
# gradsurgery.ops
from typing import Any

__file__: str
compiler: str
cuda_architectures: list[str]
cuda_version: str | None
isas: list[str]
openmp: bool

def isa() -> str: ...
def describe(tensor: object) -> dict[str, Any]: ...
def __getattr__(name: str) -> Any: ...
