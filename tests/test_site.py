"""The documentation site, beside what tests/test_docs.py asks of every page."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PACKAGES = (
    "gradsurgery",
    "gradsurgery.ops",
    "gradsurgery.surgery",
    "gradsurgery.language",
    "gradsurgery.language.data",
    "gradsurgery.language.metrics",
    "gradsurgery.unlearn",
    "gradsurgery.integrations.open_unlearning",
    "gradsurgery.integrations.torchjd",
    "gradsurgery.integrations.transformers",
)


def public(module):
    """What `::: module` shows: its `__all__`, or its own names; none that a submodule has."""
    own = (n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__)
    for name in getattr(module, "__all__", own):
        hidden = hasattr(module, "__path__") and importlib.util.find_spec(
            f"{module.__name__}.{name}"
        )
        if not name.startswith("_") and not hidden:
            yield name


def referenced():
    """The ids of all objects that pages of the reference show."""
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    for path in re.findall(r"^::: (\S+)", text, re.MULTILINE):
        found = pkgutil.resolve_name(path)
        yield id(found)
        if inspect.ismodule(found):
            yield from (id(getattr(found, name)) for name in public(found))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    if package.endswith("transformers"):
        pytest.importorskip("transformers")
    module, shown = importlib.import_module(package), set(referenced())
    missing = [name for name in module.__all__ if id(getattr(module, name)) not in shown]
    assert missing == (["integrations"] if package == "gradsurgery" else [])
