"""Puts `jobs` on the import path of the tests that start processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
