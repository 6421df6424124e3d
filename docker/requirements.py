"""Prints what a pyproject.toml asks for, its own dependencies and those of the extras named.

python requirements.py pyproject.toml [EXTRA ...]: so that an image installs them in a layer of
their own, which a change of the code leaves alone.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
extras = [project["optional-dependencies"][name] for name in sys.argv[2:]]
print("\n".join(sum(extras, project["dependencies"])))
