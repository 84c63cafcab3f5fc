"""Training that depends on round and client, and that a test can hold up: at a gate it waits for someone to let it on.

Gates are files in the folder that the environment names, called ``<client>-<round>``. One that is a named pipe tells
the test that the client is there, because opening it waits for the other side; the client goes on when the test closes
it. One that is a plain file holds the client up for as long as the test has it locked, whichever process comes to it.

Where that folder has a file ``starts``, the run's own process starts another that does not end by itself.
"""

import fcntl
import os
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np

import hanse

GATES = Path(os.environ.get("HANSE_TEST_GATES", "/nowhere"))

app = hanse.ClientApp()


def initial(seed: int) -> hanse.Model:
    """Return a small and a larger tensor."""
    if (GATES / "starts").exists():
        subprocess.Popen(["sleep", "1000"])
    rng = np.random.default_rng(seed)
    return hanse.Model({"small": rng.standard_normal(7), "large": rng.standard_normal((100, 200), np.float32)})


@app.train
def train(model: hanse.Model, ctx: hanse.TaskContext) -> hanse.Update:
    """Return the model changed by noise of this client's and round's own."""
    _pass_gate(GATES / f"{ctx.client}-{ctx.round}")
    rng = ctx.rng()
    noisy = {name: array + rng.standard_normal(array.shape).astype(array.dtype) for name, array in model.items()}
    return hanse.Update(hanse.Model(noisy), num_examples=int(rng.integers(1, 100)), metrics={"round": ctx.round})


@app.evaluate
def evaluate(model: hanse.Model, ctx: hanse.TaskContext) -> hanse.Update:
    """Return what depends on every bit of the model, and on client and round."""
    distance = sum(float(np.abs(array).sum()) for array in model.values())
    rng = ctx.rng()
    return hanse.Update(None, num_examples=int(rng.integers(1, 100)), metrics={"loss": distance * rng.random()})


def _pass_gate(gate: Path) -> None:
    with suppress(FileNotFoundError), gate.open("rb") as file:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):  # the file's own word: a test may have unlinked it by now
            file.read()
        else:
            fcntl.flock(file, fcntl.LOCK_SH)
