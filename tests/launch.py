"""Scripts in several processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(*command, n: int = 2) -> subprocess.CompletedProcess:
    """A script, or -m and a module, with its flags, in `n` processes that start in the project's folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--standalone"]  # on a port that is free
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*launcher, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
