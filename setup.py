"""Builds gradsurgery._C with CMake; everything else is in pyproject.toml."""

import os
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


setup(ext_modules=[Extension("gradsurgery._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
