"""The pages tell the truth: their code runs, and what they name exists."""

import dataclasses
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery.surgery import table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATORS = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
RULES = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
DISTRIBUTED = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
SURGEON = (ROOT / "docs" / "surgeon.md").read_text(encoding="utf-8")
# pages with a script for torchrun, and what it prints
SCRIPTS = {
    "distributed.md": "17 rows of all ranks, forget loss",
    "quickstart.md": "17 rows, of all processes",
    "tutorials/ranks.md": "step 4: 17 rows, forget loss 1.6629",
}


def blocks(text, language):
    """The code blocks of a language and the line each begins on."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(block[1], text.count("\n", 0, block.start(1))) for block in found]


def run(code, page, line, namespace):
    # empty lines before it: a failure points into the page
    exec(compile("\n" * line + code, str(page), "exec"), namespace)


# peft 0.21 and TRL 1.16 ask transformers by names that it will drop
@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated")
@pages
def test_python_blocks_run_in_order(page, capsys):
    """And print the block of text that stands below, if one does."""
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": page.name}
    shown = dict.fromkeys(code for code, _ in blocks(text, "python"))
    shown |= re.findall(r"^```python\n([^`]*?)^```\n\n```text\n(.*?)^```", text, re.M | re.S)
    for code, line in blocks(text, "python"):
        capsys.readouterr()
        run(code, page, line, namespace)
        if shown[code]:
            assert_alike(capsys.readouterr().out, shown[code])


def assert_alike(printed, shown):
    """The same words, and numbers that another processor might have come to."""
    number = r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?"
    assert re.sub(number, "#", printed).split() == re.sub(number, "#", shown).split()
    numbers = [[float(x) for x in re.findall(number, text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.2, abs=0.05), printed


@pytest.mark.parametrize("side", ["-", "+"], ids=["before", "after"])
def test_both_sides_of_the_diff_train(side):
    ((diff, line),) = blocks(README, "diff")
    code = "".join(
        text[1:] if text[:1] in (" ", side) else text if text == "\n" else "\n"
        for text in diff.splitlines(keepends=True)
    )
    batches = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(4)]
    model = nn.Linear(5, 3)
    before = model.weight.detach().clone()
    namespace = {"torch": torch, "F": F, "model": model}
    namespace |= {"loader": batches, "forget_loader": batches[:2], "retain_loader": batches[2:]}
    run(code, ROOT / "README.md", line, namespace)
    assert not torch.equal(model.weight, before)
    assert ("gs" in namespace) == ("info" in namespace) == (side == "+")


@pages
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


@pages
def test_files_named_exist(page):
    # csrc/<op>.h and its like are patterns, not names
    name = (
        r"(?<![\w./-])(?:gradsurgery|csrc|tests|benchmarks|scripts|docs|\.ci)/[\w./]*(?![\w./<*-])"
    )
    for path in re.findall(name, page.read_text(encoding="utf-8")):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_the_layout_is_the_tree():
    ((tree, _),) = blocks(README, "text")
    named = [line.split()[0] for line in tree.splitlines()]
    assert len(named) == 14
    for path in named:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_the_readme_is_short_and_begins_with_two_commands():
    lines = README.splitlines()
    assert len(lines) <= 130
    first = "\n".join(lines[:12])
    assert "\nmake demo" in first
    assert "\nmake test" in first


def test_the_readme_repeats_the_results():
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    table = README.split("<!-- results -->")[1]
    numbers = re.findall(r"[\d.]+ ± [\d.]+", table)
    assert numbers
    for number in numbers:
        assert number in results, number


# at the end of a script whose model is sharded: no parameter is whole
SHARDED = "\nassert all(hasattr(p, 'to_local') for p in model.parameters())\n"


def sharded(page, code):
    """A script with `fully_shard` as its page has it, in the place of `DistributedDataParallel`."""
    if page == "quickstart.md":  # in a comment beside it
        wrapping = r"= DistributedDataParallel\((.*)\)  # or (fully_shard\(model\))\n"
        code, count = re.subn(wrapping, r"= \1\n\2\n", code)
        code = f"from torch.distributed.fsdp import fully_shard\n{code}"
    else:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        ((lines, _),) = blocks(text.split("in place of `DistributedDataParallel`")[1], "text")
        wrapping = r"^    model = DistributedDataParallel\(model\).*\n"
        code, count = re.subn(wrapping, textwrap.indent(lines, "    "), code, flags=re.M)
    assert count == 1
    return code + SHARDED


@pytest.mark.parametrize(
    ("page", "change"),
    [
        *((page, None) for page in SCRIPTS),
        *((page, sharded) for page in ("quickstart.md", "tutorials/ranks.md")),
    ],
)
def test_scripts_of_many_ranks_run_on_two(page, change, tmp_path):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    ((code, _),) = blocks(text, "py")
    if change is not None:
        code = change(page, code)
    # in torch 2.13 a thread of gloo's may abort a process that ends at once
    (tmp_path / "example.py").write_text(f"{code}\nimport time\n\ntime.sleep(1)\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", str(tmp_path / "example.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert SCRIPTS[page] in done.stdout
    for shown, _ in blocks(text, "text"):
        if SCRIPTS[page] in shown:
            assert_alike(done.stdout, shown)


def test_the_table_of_counted_costs_is_the_script():
    script = runpy.run_path(str(ROOT / "scripts" / "count_ranks.py"))
    assert DISTRIBUTED.split(script["MARK"])[1].strip() == script["table"]()


@pages
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split()
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"`make ([^`]+)`", text)
    for code, _ in blocks(text, "sh"):
        commands += re.findall(r"^make ([^#\n]+)", code, re.MULTILINE)
    for command in commands:
        for word in shlex.split(command):
            assert word in targets or "=" in word, f"make {command}"


@pages
def test_unlearn_commands_parse(page):
    pytest.importorskip("tyro")
    from gradsurgery.unlearn.command import parse
    from tests.unlearn.tiny import JOB

    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for options in re.findall(r"gradsurgery unlearn digits\b([^`#\n]*)", text):
        if "--config" not in options:
            parse(JOB, shlex.split(options)).job.check()


@pages
def test_no_path_of_one_machine(page):
    text = page.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert not re.findall(r"(?<![\w.:/])/(?:home|root|tmp|mnt|opt|srv|work|Users)/\S*", text)


def test_every_public_name_is_on_a_page():
    for name in gs.__all__:
        assert re.search(rf"\b{name}\b", OPERATORS + RULES + SURGEON), name


def test_the_table_of_rules_is_the_registry():
    assert RULES.split("<!-- rules -->")[1].strip() == table.markdown()


def test_the_table_of_options_is_the_code():
    for field in dataclasses.fields(gs.OrthoGrad):
        if not field.init:  # what the rule remembers
            continue
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        assert f"| `{field.name}` | {default} |" in OPERATORS


def test_versions_agree():
    assert f"*gradsurgery* {gs.__version__}" in README
    assert f"## [{gs.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_table_of_methods_is_the_registry():
    from gradsurgery.unlearn.report import methods

    page = (ROOT / "docs" / "unlearning.md").read_text(encoding="utf-8")
    assert page.split("<!-- methods -->")[1].strip() == methods.markdown()


def test_the_table_of_language_losses_is_the_registry():
    from gradsurgery.language import registry

    page = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    assert page.split("<!-- losses -->")[1].strip() == registry.markdown()


def test_the_table_of_pairs_is_what_rules_take():
    from gradsurgery.language import pairs

    page = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    assert page.split("<!-- pairs -->")[1].strip() == pairs.markdown()
