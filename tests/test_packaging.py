"""What is published: one version, what the sdist and the wheel hold, what is installed with it."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import gradsurgery
from tests.test_rooms import imports, modules

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(*arguments):
    call = [sys.executable, "setup.py", "-q", *map(str, arguments)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The files in it, by name."""
    folder = tmp_path_factory.mktemp("sdist")
    build("egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    (path,) = folder.glob("gradsurgery-*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.isfile()]
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read() for member in members
        }


def test_one_version_everywhere(project):
    version = gradsurgery.__version__
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "gradsurgery.__version__"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] in (version, "Unreleased")
    said = re.findall(r"\*gradsurgery\* ([\d.]+\d)", (ROOT / "README.md").read_text())
    assert set(said) <= {version}


def test_one_list_of_pythons(project):
    prefix = "Programming Language :: Python :: 3."
    named = [line for line in project["project"]["classifiers"] if line.startswith(prefix)]
    pythons = [line.rpartition(" ")[2] for line in named]
    assert project["project"]["requires-python"] == f">={pythons[0]}"
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert ci["jobs"]["pythons"]["strategy"]["matrix"]["python"] == pythons
    wheels = project["tool"]["cibuildwheel"]["build"]
    assert wheels.startswith(f"cp3{{{','.join(each.partition('.')[2] for each in pythons)}}}-")


def test_torch_is_all_that_comes_along(project):
    (only,) = project["project"]["dependencies"]
    assert only.startswith("torch>=")
    versions = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["versions"]
    lowest = versions["strategy"]["matrix"]["include"][0]
    extras = project["project"]["optional-dependencies"]
    for line in (only, *(each for each in extras["hf"] if each.startswith("transformers"))):
        assert f"{line.replace('>=', '==')}.0" in lowest["pins"].split()


def test_every_import_has_its_extra(project):
    """Each project that the package imports stands in an extra, or comes with one that does."""
    with_others = {
        "torch": "itself",
        "numpy": "scikit-learn",
        "triton": "torch",
        "huggingface-hub": "transformers",
        "markupsafe": "jinja2",
        "trainer": "open-unlearning",  # a folder of that repository, which is no package
    }
    extras = project["project"]["optional-dependencies"]
    named = {re.split(r"[\[>=<; ]", line)[0] for lines in extras.values() for line in lines}
    found = {
        gradsurgery.extras.project_of(wanted)
        for path in modules().values()
        for wanted in imports(path.read_text(encoding="utf-8"))
        if wanted.partition(".")[0] not in {*sys.stdlib_module_names, "gradsurgery"}
    }
    assert found - named - set(with_others) == set()


def test_tests_of_a_wheel_have_what_they_import(project):
    """Those that a release runs need no package but torch, what it brings, and what is named."""
    wheels = project["tool"]["cibuildwheel"]
    found, seen = set(), set()
    waiting = [ROOT / "tests/conftest.py"]
    for part in re.findall(r"tests/\S+", wheels["test-command"]):
        waiting += (ROOT / part).rglob("*.py") if (ROOT / part).is_dir() else [ROOT / part]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for wanted in imports(path.read_text(encoding="utf-8")):
            top = wanted.partition(".")[0]
            if top == "tests":
                named = wanted, wanted.rpartition(".")[0]
                files = [ROOT / f"{each.replace('.', '/')}.py" for each in named]
                waiting += [each for each in files if each.exists()]
            elif top not in {*sys.stdlib_module_names, "gradsurgery"}:
                found.add(gradsurgery.extras.project_of(wanted))
    with_torch = {"torch", "mpmath"}
    assert found - with_torch == set(wheels["test-requires"]) - {"pytest-benchmark"}


def test_the_sdist_builds_and_tests_itself(sdist):
    for folder in ("csrc", "gradsurgery", "tests"):
        mine = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix not in (".so", ".pyc")
        }
        assert mine <= set(sdist)
    others = {"CMakeLists.txt", "setup.py", "LICENSE", "CHANGELOG.md", "constraints.txt"}
    assert others <= set(sdist)
    assert not [name for name in sdist if name.endswith((".so", ".pyc"))]


def test_links_of_the_readme_lead_somewhere_from_an_index(sdist, project):
    text = sdist["PKG-INFO"].decode()
    assert "Description-Content-Type: text/markdown" in text
    links = re.findall(r"""(?:\]\(|src=["']|href=["'])([^)"'\s]+)""", text)
    base = project["project"]["urls"]["Repository"]
    assert len(links) > 5
    for link in links:
        assert link.startswith(("http", "#")), link
        if link.startswith(base):
            kind, tag, path = link.removeprefix(f"{base}/").split("/", 2)
            assert kind in ("raw", "blob") and tag == f"v{gradsurgery.__version__}"
            assert (ROOT / path.partition("#")[0]).exists(), path


def test_the_wheel_has_all_that_is_no_python(tmp_path):
    build("build_py", "--build-lib", tmp_path, "egg_info", "--egg-base", tmp_path)
    package = ROOT / "gradsurgery"
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    data = {path for path in files if path.suffix not in (".py", ".pyc", ".so")}
    assert {Path("py.typed"), Path("_C.pyi")} <= data
    assert data == {path for path in data if (tmp_path / "gradsurgery" / path).exists()}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} <= {
        "gradsurgery",
        "gradsurgery.egg-info",
    }


def test_workflows_call_what_there_is():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text()
        assert set(re.findall(r"run: make (\w+)", text)) <= targets, path.name
        for script in re.findall(r"(?:python |run: )((?:scripts/|\.ci/)[\w.]+)", text):
            assert (ROOT / script).exists(), (path.name, script)
