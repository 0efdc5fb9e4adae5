"""Packages that are not there: which extra brings them, in every error and from the doctor."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import gradsurgery as gs
from gradsurgery import doctor, extras
from gradsurgery.cli import main
from gradsurgery.errors import MissingPackageError
from gradsurgery.extras import Requirement
from gradsurgery.unlearn.jobs import registry

PACKAGES = ("sklearn", "scipy", "matplotlib", "transformers", "accelerate", "rouge_score")
# what a user calls or imports, and what it then names; None: it needs nothing but torch
WITHOUT = {
    "import gradsurgery.unlearn": None,
    "gs.UPGrad()(torch.randn(3, 9)), gs.diagnose(torch.eye(3))": None,
    "gs.diagnose(torch.eye(3)).plot()": ("plot", "matplotlib", "cli"),
    "from gradsurgery.unlearn import attacks; attacks.auc(torch.rand(3), torch.rand(3))": (
        "auc",
        "scipy",
        "jobs",
    ),
    "from gradsurgery.unlearn import attacks; attacks.roc(torch.rand(3), torch.rand(3))": (
        "roc",
        "scikit-learn",
        "jobs",
    ),
    "from gradsurgery.integrations.transformers import SurgeryTrainer": (
        "gradsurgery.integrations.transformers",
        "accelerate",
        "hf",
    ),
    "from gradsurgery.language import metrics; metrics.rouge_l({0: 'a'}, {0: 'a'})": (
        "rouge_l",
        "rouge-score",
        "language",
    ),
}


TRY_ALL = """
import json, sys
for name in {hidden}:
    sys.modules[name] = None
import torch, gradsurgery as gs
said = {{}}
for code in {codes}:
    try:
        exec(code)
    except Exception as error:
        said[code] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said():
    """The error of each code, if any, in a process that finds none of these packages."""
    code = TRY_ALL.format(hidden=PACKAGES, codes=list(WITHOUT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("code", WITHOUT)
def test_with_torch_alone_an_error_names_the_extra(code, said):
    if WITHOUT[code] is None:
        assert code not in said
        return
    by, project, extra = WITHOUT[code]
    wanted = f"{by} needs {project}: pip install 'gradsurgery[{extra}]'"
    assert said[code] == f"MissingPackageError: {wanted}"


def test_the_error_is_one_of_imports_and_of_input():
    with pytest.raises(MissingPackageError) as caught:
        extras.package("no_such_package.of_ours", "cli", "this")
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, gs.InputError)
    assert str(caught.value).startswith("this needs no-such-package: ")


def test_an_error_inside_the_package_stays_what_it_is():
    error = ModuleNotFoundError("No module named 'gradsurgery.x'", name="gradsurgery.x")
    assert extras.missing(error, "cli", "this") is error


def test_requirements_are_those_of_the_installed_package(monkeypatch):
    lines = [
        "torch>=2.11",
        'scikit-learn; extra == "jobs"',
        'torchjd[cagrad,nash-mtl]>=0.18,<1; extra == "bench"',
        "old (>=1.0) ; extra == 'cli'",
        'triton>=3.6; sys_platform == "linux" and extra == "dev"',
    ]
    monkeypatch.setattr(extras.metadata, "requires", lambda name: lines)
    assert extras.requirements() == [
        Requirement("torch", ">=2.11", ""),
        Requirement("scikit-learn", "", "jobs"),
        Requirement("torchjd", ">=0.18,<1", "bench"),
        Requirement("old", ">=1.0", "cli"),
    ]
    assert extras.extra_of("sklearn.metrics") == "jobs"
    assert extras.extra_of("torch") is None


@pytest.mark.parametrize(
    "version,versions,wanted",
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.11.0", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("2.11", ">=2.11.0", True),
        ("3.0rc1", ">=2.11,<3", False),
        ("2.99", ">=2.11,<3", True),
        ("1.0", "", True),
    ],
)
def test_versions_in_and_out_of_range(version, versions, wanted):
    assert extras.fits(version, versions) is wanted


def advice(monkeypatch, *asked, **versions):
    """The doctor's advice where these packages are installed and others are not."""
    wanted = [Requirement("torch", ">=2.11", ""), *asked]
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, doctor.ABSENT))
    return doctor.advice()


def test_the_doctor_says_which_extra_brings_what_is_missing(monkeypatch):
    asked = (
        Requirement("tyro", "", "cli"),
        Requirement("rich", "", "cli"),
        Requirement("transformers", ">=4.51", "hf"),
        Requirement("ruff", "", "dev"),
    )
    found = advice(monkeypatch, *asked, torch="2.9.1", rich="1", transformers="4.40.0")
    assert found[-3:] == [
        'torch 2.9.1 is too old or too new: pip install --upgrade "torch>=2.11"',
        'extra cli lacks tyro: pip install "gradsurgery[cli]"',
        'extra hf lacks transformers>=4.51 (4.40.0 is here): pip install "gradsurgery[hf]"',
    ]


def test_jobs_are_listed_although_one_lacks_a_package(monkeypatch, capsys):
    def find(name):
        if name == "images":
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
        return SimpleNamespace(about=f"what {name} is")

    monkeypatch.setattr(registry, "find", find)
    main(["unlearn", "--help"])
    said = capsys.readouterr().out
    advice = 'pip install "gradsurgery[cli,jobs,images]"'
    assert f"images   needs pillow, which is not installed: {advice}" in said
    assert "text     what text is" in said


def native(**known):
    return SimpleNamespace(**{"openmp": True, "cuda_version": None, **known})


def test_the_doctor_says_how_to_get_kernels(monkeypatch):
    def found(module, **gpu):
        monkeypatch.setattr(doctor, "_load_native", lambda: (module, "" if module else "absent: x"))
        monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: bool(gpu))
        monkeypatch.setattr(doctor._backend, "TRITON", gpu.get("triton", True))
        monkeypatch.setattr(doctor.shutil, "which", lambda name: gpu.get("tool"))
        monkeypatch.setattr(doctor.sys, "platform", "linux")
        return [line.partition(":")[0] for line in advice(monkeypatch, torch="2.13.0")]

    assert found(native()) == []
    assert found(native(openmp=False)) == ["openmp"]
    assert found(None) == ["native module"]
    assert found(native(cuda_version="13.0"), triton=True) == []
    assert found(native(), triton=True) == ["cuda kernels"]
    assert found(native(), triton=False) == ["cuda kernels", "triton"]
    monkeypatch.setattr(doctor.torch.version, "cuda", None)
    assert found(native(cuda_version="13.0"), tool="/usr/bin/nvidia-smi") == ["torch"]


def test_the_doctor_prints_its_advice_last(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "advice", list)
    doctor.main()
    assert capsys.readouterr().out.endswith("\n\nnothing is missing\n")
    monkeypatch.setattr(doctor, "advice", lambda: ["one", "two"])
    doctor.main()
    assert re.search(r"\n\none\ntwo\n$", capsys.readouterr().out)
