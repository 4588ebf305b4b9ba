"""Takes the manifests and boards, which lie at the top of the checkout, along in the wheel as bench/_data/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PATTERNS = ("data_manifests/**/*.toml", "data_manifests/**/*.csv", "reports/*.toml", "reports/published/*.csv")


class BuildWithData(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # the checkout itself is on the path
            return
        root, target = Path(__file__).parent, Path(self.build_lib) / "bench" / "_data"
        for source in sorted(path for pattern in PATTERNS for path in root.glob(pattern)):
            copy = target / source.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


setup(cmdclass={"build_py": BuildWithData})
