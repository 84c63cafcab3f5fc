"""The signatures of the contract, by the check that the product's owners run themselves."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2].parent / "shared" / "checks" / "server_api.py"


@pytest.mark.skipif(not CHECK.is_file(), reason="the contract's check lies beside the repository, and is not there")
def test_signatures_are_those_of_the_contract() -> None:
    done = subprocess.run([sys.executable, str(CHECK)], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
    assert "signatures hold" in done.stdout
