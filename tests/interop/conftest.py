"""The small models of tests/model, for tests of other people's programs with them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
