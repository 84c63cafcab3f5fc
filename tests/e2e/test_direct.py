"""The program in the documentation that uses the two classes directly runs as it stands."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_program_that_uses_the_classes_directly_completes_a_job() -> None:
    command = [sys.executable, str(ROOT / "examples" / "direct.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "registered: site-1, site-2" in done.stdout
    assert "round 20 of digits-" in done.stdout
    assert done.stdout.splitlines()[-1].split(":")[0].endswith(" completed")
