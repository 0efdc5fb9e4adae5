"""Builds one wheel without torch and runs the operator tests on it under several torch versions.

python scripts/check_abi.py [--torch 2.11.0 2.13.0] [--keep FOLDER]

The contract of the compiled module is DLPack's C ABI and Python's, not torch's: this is what
checks it. Every torch but the pinned one is a large download: CI has a job of its own for it, and
.ci/run leaves it out.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import torch, gradsurgery.doctor
from gradsurgery import _C
assert torch.__version__.split("+")[0] == "{version}", torch.__version__
assert _C.describe(torch.zeros(3, 4).T)["strides"] == [1, 4]
gradsurgery.doctor.main()
"""


def run(*command: str | Path, cwd: Path | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def make_venv(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def build_wheel(work: Path) -> Path:
    """The wheel of the committed tree, built in isolation by an interpreter that has no torch."""
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    run("git", "clone", "--quiet", ROOT, source)
    python = make_venv(work / "build")
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", work / "wheels", source)
    (wheel,) = (work / "wheels").glob("gradsurgery-*.whl")
    return wheel


def test_wheel(wheel: Path, version: str, work: Path) -> None:
    """Run the operator tests of `wheel`, beside the tests alone, with torch `version`."""
    python = make_venv(work / f"torch-{version}")
    pip = (python, "-m", "pip", "install", "--quiet")
    pins = work / f"constraints-{version}.txt"
    lines = (work / "source/constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("torch==", "setuptools=="))]
    pins.write_text("\n".join([*kept, f"torch=={version}"]))
    # the same as a release asks for; no tomllib, which Python 3.10 has not
    project = (work / "source/pyproject.toml").read_text()
    needed = ast.literal_eval(re.search(r"^test-requires = (.*)$", project, re.MULTILINE)[1])
    run(*pip, "-c", pins, "torch", *needed)
    run(*pip, "--no-deps", "--force-reinstall", wheel)
    tree = work / f"tests-{version}"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(work / "source/tests", tree / "tests")
    shutil.copy(work / "source/pyproject.toml", tree)
    run(python, "-c", SMOKE.format(version=version), cwd=tree)
    run(python, "-m", "pytest", "--quiet", "tests/test_build.py", "tests/ops", cwd=tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=["2.11.0", "2.13.0"], metavar="VERSION")
    parser.add_argument(
        "--keep", type=Path, help="work in this folder, and find its torch again next time"
    )
    arguments = parser.parse_args()
    work = arguments.keep or Path(tempfile.mkdtemp())
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        wheel = build_wheel(work)
        for version in arguments.torch:
            test_wheel(wheel, version, work)
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {error}")
    finally:
        if arguments.keep is None:
            shutil.rmtree(work)
    print(f"one file, {wheel.name}, passed with torch {' and '.join(arguments.torch)}")


if __name__ == "__main__":
    main()
