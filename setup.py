"""Builds gradsurgery._C with CMake, and the README for PyPI; all else is in pyproject.toml."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zlib import crc32

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/gradsurgery/gradsurgery"


def readme() -> str:
    """README.md with links that lead from any page to the files of this version."""
    source = (ROOT / "gradsurgery/__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    # ](path) and src="path", but no address and no #heading
    link = re.compile(r"""(\]\(|(?:src|srcset|href)=["'])(?!https?:|mailto:|#)([^)"'\s]+)""")

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[2].endswith((".svg", ".png", ".jpg", ".gif", ".webp")) else "blob"
        return f"{match[1]}{REPOSITORY}/{kind}/v{version}/{match[2]}"

    return link.sub(absolute, text)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        arguments = os.environ.get("CMAKE_ARGS", "")
        # kept between builds, one per interpreter and arguments, so that a rebuild is incremental
        key = f"{sysconfig.get_config_var('SOABI')}-{crc32(arguments.encode()):08x}"
        build = ROOT / "build" / key
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # every path is given each time: those of an isolated build are gone at the next one
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-GNinja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(arguments),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("gradsurgery._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
