"""Print what a pyproject.toml requires, with some of its extras: one line each, for pip.

    python3 requirements.py pyproject.toml [EXTRA ...]

So that an image can have the libraries in a layer that does not change with the code.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
extras = project["optional-dependencies"]
required = [*project["dependencies"], *(r for name in sys.argv[2:] for r in extras[name])]
sys.stdout.write("".join(f"{requirement}\n" for requirement in required))
