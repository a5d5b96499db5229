"""Builds the ROS interfaces when pip builds pi05_ros; everything else is in pyproject.toml.

colcon does not use this file: package.xml says ament_cmake, so colcon drives CMakeLists.txt. pip
drives the same CMakeLists.txt from here into a staging prefix and packs that prefix:

    <stage>/lib/python3.X/site-packages/pi05_ros/**  → the package's generated modules
    <stage>/{lib/*.so, lib/pi05_ros, share, include}/** → the same places below sys.prefix

which is where the ROS 2 wheels put theirs, so that the ament index, the library path set by
ros-wheels-bootstrapper and `ros2 run` find this package without another step.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

HERE = Path(__file__).resolve().parent
PACKAGE = "pi05_ros"


def require_build_tools() -> None:
    """Stop with one line when the compiler or CMake is missing."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(
            f"pi05_ros: {' and '.join(missing)} not found, needed to build the ROS messages. "
            "Install them: apt-get install cmake g++"
        )


def ros_prefixes() -> list[str]:
    """Where to search for ROS 2: a sourced setup.bash first, then where the wheels are."""
    prefixes = [p for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    try:
        import ament_index_python

        # <prefix>/lib/python3.X/site-packages/ament_index_python/__init__.py
        prefixes.append(str(Path(ament_index_python.__file__).resolve().parents[4]))
    except ImportError:
        pass
    prefixes.append(sys.prefix)
    return list(dict.fromkeys(prefixes))


class BuildRos(Command):
    """Configure, build and stage CMakeLists.txt."""

    description = "build the ROS interfaces with CMake"
    user_options: list = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None
        self.outputs: dict[str, str] = {}

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        require_build_tools()
        stage = self._cmake(HERE / "build" / f"rosidl-{sys.implementation.cache_tag}")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = stage / "lib" / version / "site-packages"
        if not site.is_dir():  # Debian's ROS: local/lib/…/dist-packages
            site = next(stage.glob("**/*-packages"))
        self._take_generated_modules(site)
        self._take_data_files(stage, site)

    def _cmake(self, work: Path) -> Path:
        stage = work / "stage"
        shutil.rmtree(work, ignore_errors=True)  # an isolated build has new paths at every run
        work.mkdir(parents=True)
        prefixes = ros_prefixes()
        libraries = [str(Path(prefix) / "lib") for prefix in prefixes]
        inherited = [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if p]
        env = {
            **os.environ,
            "AMENT_PREFIX_PATH": os.pathsep.join(prefixes),
            "CMAKE_PREFIX_PATH": os.pathsep.join(prefixes),
            "LD_LIBRARY_PATH": os.pathsep.join(libraries + inherited),
        }
        configure = [
            *("cmake", "-S", str(HERE), "-B", str(work / "b")),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_TESTING=OFF",
            f"-DCMAKE_INSTALL_PREFIX={stage}",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DCMAKE_PROJECT_INCLUDE={HERE}/cmake/pypi_wheels.cmake",
        ]
        jobs = str(min(4, os.cpu_count() or 1))
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(work / "b"), "-j", jobs], check=True, env=env)
        subprocess.run(["cmake", "--install", str(work / "b")], check=True, env=env)
        return stage

    def _take_generated_modules(self, site: Path) -> None:
        assert self.build_lib is not None
        target_root = HERE if self.editable_mode else Path(self.build_lib)
        for source in sorted((site / PACKAGE).rglob("*")):
            relative = source.relative_to(site)
            if source.is_dir() or "__pycache__" in relative.parts or source.suffix == ".c":
                continue
            generated = relative.parts[1] == "msg" or source.suffix == ".so"
            if not generated and (HERE / relative).exists():
                continue  # hand-written: setuptools packs those
            target = target_root / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
            self.outputs[str(target)] = str(source)

    def _take_data_files(self, stage: Path, site: Path) -> None:
        data: dict[str, list[str]] = {}
        for source in sorted(stage.rglob("*")):
            relative = source.relative_to(stage)
            if source.is_dir() or site in source.parents or "__pycache__" in relative.parts:
                continue
            data.setdefault(str(relative.parent), []).append(str(source))
        self.distribution.data_files.extend(sorted(data.items()))

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return sorted(self.outputs)

    def get_output_mapping(self) -> dict[str, str]:
        return {} if self.editable_mode else dict(self.outputs)


class Build(build):
    """setuptools' build, then the ROS interfaces."""

    sub_commands = [*build.sub_commands, ("build_ros", None)]


class BinaryDistribution(Distribution):
    """A platform wheel with data files."""

    def has_ext_modules(self) -> bool:
        return True

    def has_data(self) -> bool:  # setuptools' editable_wheel asks before install_data
        return True


setup(
    data_files=[],
    zip_safe=False,
    cmdclass={"build": Build, "build_ros": BuildRos},
    distclass=BinaryDistribution,
)
