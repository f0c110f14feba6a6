"""Run eval-scripts/cate-cls-test.py, which the original repository has here too."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "eval-scripts" / "cate-cls-test.py"), run_name="__main__")
