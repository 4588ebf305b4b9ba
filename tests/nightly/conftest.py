"""Tests for a night, on a machine of one's own: real file systems, power cuts, other programs, other versions.

They need what a machine for CI may not have (root, loop devices, Debian's packages) and skip, saying what is missing.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "survival"))  # faults.py, corpus.py

from faults import memory, quick  # noqa: F401  (fixtures)
