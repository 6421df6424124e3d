"""Puts the benchmarks on the import path, whose hosts on shaped links the examples run on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
