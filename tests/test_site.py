"""The documentation site, beside what tests/test_docs.py asks of every page."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs

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


def sides(title):
    """The diffs of a section of docs/moving.md, each as the code before and after."""
    page = (DOCS / "moving.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]
    for diff in re.findall(r"^```diff\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        lines = diff.splitlines()
        yield tuple(
            "\n".join(line[1:] for line in lines if line[:1] in ("", " ", side)) for side in "-+"
        )


class PCGrad:
    """Stands in for that of Pytorch-PCGrad: the mean of the changed gradients, of two losses."""

    def __init__(self, optimizer):
        self.optimizer, self.zero_grad, self.step = optimizer, optimizer.zero_grad, optimizer.step

    def pc_backward(self, objectives):
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grads = [torch.autograd.grad(one, parameters, retain_graph=True) for one in objectives]
        a, b = (torch.cat([grad.flatten() for grad in each]) for each in grads)
        least = (a @ b).clamp(max=0)
        mean = (a - least / (b @ b) * b + b - least / (a @ a) * a) / 2
        for p, grad in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)


class GradSampleModule(nn.Module):
    """Stands in for that of opacus: grad_sample [B, *p.shape] after a backward pass of a sum."""

    def __init__(self, model, loss_reduction):
        super().__init__()
        assert loss_reduction == "sum"
        self.model = model

    def forward(self, inputs):
        outputs = inputs
        for layer in self.model:
            before, outputs = outputs, layer(outputs)
            if isinstance(layer, nn.Linear):
                outputs.register_hook(partial(self.keep, layer, before.detach()))
        return outputs

    def keep(self, layer, before, grad):
        layer.weight.grad_sample = grad[:, :, None] * before[:, None]
        layer.bias.grad_sample = grad


MOVES = [
    ("From TorchJD", 3, "torchjd"),
    ("From Opacus", 1, None),
    ("From a PCGrad repository", 1, None),
]


@pytest.mark.parametrize(("title", "count", "package"), MOVES, ids=lambda value: str(value))
def test_both_sides_of_a_move_train_alike(title, count, package, monkeypatch):
    if package:
        pytest.importorskip(package)
    monkeypatch.setitem(sys.modules, "pcgrad", SimpleNamespace(PCGrad=PCGrad))
    monkeypatch.setitem(sys.modules, "opacus", SimpleNamespace(GradSampleModule=GradSampleModule))
    found = list(sides(title))
    assert len(found) == count
    for pair in found:
        before, after = (trained(code) for code in pair)
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def trained(code):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(3)]
    tasks = [(torch.randn(6, 5), torch.randn(6)) for _ in range(3)]
    namespace = {"model": model, "optimizer": optimizer, "loader": loader, "task_loader": tasks}
    exec(code, namespace | {"torch": torch, "F": F})
    assert not any(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_the_tables_of_benchmarks_are_of_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    script = runpy.run_path(str(DOCS / "pictures" / "benchmarks.py"))
    tables = script["tables"]()
    for name in script["PAGES"][page]:
        assert text.split(f"<!-- {name} -->")[1].strip() == tables[name]


def test_every_variable_that_is_read_is_on_its_page():
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    sources = [*ROOT.glob("gradsurgery/**/*.py"), *ROOT.glob("csrc/*.h"), ROOT / "setup.py"]
    read = r"(?:environ(?:\.get|\.setdefault)?[\[(]|getenv\()\"(\w+)\""
    found = {name for path in sources for name in re.findall(read, path.read_text("utf-8"))}
    assert "GRADSURGERY_BACKEND" in found
    assert not [name for name in found if f"`{name}`" not in page]


def test_every_page_is_in_the_menu():
    """As the build asks, too; what is not yet there may be named as such."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.glob("**/*.md"):
        assert re.search(rf"\b{page.relative_to(DOCS).as_posix()}\b", text), page


def test_the_site_links_to_the_repository_that_the_package_names():
    named = re.search(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    if named:
        assert f"repository: {named[1]}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_rules_and_methods_are_counted():
    from gradsurgery.unlearn import METHODS

    for page in DOCS.glob("**/*.md"):
        text = page.read_text(encoding="utf-8")
        for number in re.findall(r"\b(\d+) \[?rules\b", text):
            assert int(number) == len(gs.RULES), page
        for number in re.findall(r"\b(\d+) \[?(?:unlearning )?methods\b", text):
            assert int(number) == len(METHODS), page
