"""What pyproject.toml cannot say: recipes and DeepSpeed presets in a wheel, where the program looks for them, and the C
of ``tunesmith.native``."""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "deepspeed_configs")
NATIVE = Path("src/tunesmith/native")
LIBRARIES = ("training", "serving")
# Named as torch names what it runs on: AVX512, AVX2. Any other processor gets what its compiler takes for granted.
LEVELS = {"x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "x86_64_v3": ["-march=x86-64-v3"]}
# OpenMP is compiled for and not linked: threads are those of the library that torch has loaded.
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


class BuildWithRecipes(build_py):
    """Copies ``FOLDERS`` into the built package. An editable installation has them beside ``src``."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in FOLDERS:
            target = Path(self.build_lib) / "tunesmith" / folder
            self.mkpath(str(target))
            for file in sorted(Path(folder).iterdir()):
                self.copy_file(str(file), str(target / file.name))


def native() -> list[Extension]:
    """One library a file and level. None is necessary: what cannot be compiled is computed by torch."""
    levels = LEVELS if platform.machine() in ("x86_64", "AMD64") else {"any": []}
    return [
        Extension(
            f"tunesmith.native.{name}_{level}",
            [str(NATIVE / f"{name}.c")],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            extra_compile_args=[*FLAGS, *flags],
            optional=True,
        )
        for name in LIBRARIES
        for level, flags in levels.items()
    ]


setup(cmdclass={"build_py": BuildWithRecipes}, ext_modules=native())
