"""The runner of the command, and what makes the models."""

import sys
from pathlib import Path

from fixtures_models import devec, work

sys.path.append(str(Path(__file__).parent))

__all__ = ["devec", "work"]
