"""A job that fails at the site whose environment says how; elsewhere it trains."""

import os
import signal
from pathlib import Path

import numpy as np

import hanse

HOW = os.environ.get("HANSE_TEST_FAILS", "")

match HOW:
    case "missing":
        import no_such_package  # noqa: F401 - which is the point
    case "import":
        from json import no_such_name  # noqa: F401 - which is the point

app = hanse.ClientApp()


def initial() -> hanse.Model:
    """Return the smallest model."""
    return hanse.Model({"w": np.zeros(1, np.float32)})


@app.train
def train(model: hanse.Model, ctx: hanse.TaskContext) -> hanse.Update:
    """Fail as the environment says."""
    print(f"{ctx.client} trains")  # noqa: T201 - it goes to the log
    match HOW:
        case "raise":
            raise KeyError("label")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory" if Path(os.environ["HANSE_TEST_GREEDY"]).exists():
            print(f"{len(b'x' * (1 << 30))} bytes were to be had")  # noqa: T201 - it goes to the log
        case "wait":
            Path(os.environ["HANSE_TEST_GATE"]).read_bytes()  # a pipe, which a test opens and closes
    return hanse.Update(model, num_examples=1)
