import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Hanse

WAITING = """
import os
from pathlib import Path
import hanse

app = hanse.ClientApp()

@app.train
def train(model, ctx):
    Path(os.environ["GATE"]).read_bytes()  # a named pipe, which a test opens and closes
    return hanse.Update(model, 1)
"""


@pytest.fixture
def job(hanse: Hanse, tmp_path: Path) -> Path:
    """A job of which a client waits in its first training."""
    hanse("new", tmp_path / "job")
    (tmp_path / "job" / "client.py").write_text(WAITING)
    return tmp_path / "job"


def test_a_simulation_that_is_asked_to_end_leaves_no_file(job: Path, tmp_path: Path) -> None:
    gate, temporary = tmp_path / "gate", tmp_path / "temporary"
    os.mkfifo(gate)
    temporary.mkdir()
    program = f"import sys, hanse.cli; sys.exit(hanse.cli.main(['simulate', {str(job)!r}, '--workers', '1']))"
    env = {**os.environ, "TMPDIR": str(temporary), "GATE": str(gate)}
    with (
        subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.PIPE, text=True) as process,
        gate.open("wb"),  # from here on a client trains
    ):
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("out", ["", "nowhere/model.safetensors"])
def test_a_model_that_could_not_be_written_is_refused_before_the_simulation(
    hanse: Hanse, job: Path, tmp_path: Path, out: str
) -> None:
    ended = hanse("simulate", job, "--out", tmp_path / out)
    assert ended.status == 2
    assert ended.err == f"hanse: --out is '{tmp_path / out}'; expected a file in a folder that is there [config]\n"
