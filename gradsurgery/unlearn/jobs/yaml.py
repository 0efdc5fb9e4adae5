"""Options as YAML: a file is read as data and no further than it is options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gradsurgery.errors import InputError
from gradsurgery.text import brief, show
from gradsurgery.unlearn.jobs import files
from gradsurgery.unlearn.jobs.files import DamageError
from gradsurgery.unlearn.training.config import to_dict

LARGEST = 2**18  # bytes of a file of options; all there are have some 5,000


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """A YAML file's top-level mapping; `InputError` naming `option` where there is none.

    A file of the user's own may be a link or a pipe, one in a run directory may not.
    """
    ours = os.path.isdir(path.parent / "stages")  # a run's, perhaps from somebody else
    try:
        return parse_yaml(files.read(path.parent, path.name) if ours else files.read_given(path))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{option}: cannot read {show(path)}: {reason}") from None
    except DamageError as error:
        raise InputError(f"{option}: {show(path)} {str(error).removeprefix('it ')}") from None


def parse_yaml(data: bytes) -> dict[str, Any]:
    """The top-level mapping of some YAML; `DamageError` where there is none.

    Aliases are refused: a few lines of them can stand for more than there is memory.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise DamageError("it has an alias, *name: write out what it stands for")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                raise DamageError(f"it has a name twice, of {brief(list(found))}")
            return found

    if len(data) > LARGEST:
        raise DamageError(f"it has {len(data)} bytes, more than {LARGEST}")
    try:
        content = yaml.load(data.decode(), Loader)
    except DamageError:
        raise
    except RecursionError:
        raise DamageError("it is nested too deeply") from None
    except Exception as error:  # constructors of numbers and dates raise errors of any kind
        raise DamageError(f"it is not YAML: {show(' '.join(str(error).split()))}") from None
    if not isinstance(content, dict):
        raise DamageError("it must hold options as `name: value` lines")
    return content


def to_yaml(config: Any) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)
