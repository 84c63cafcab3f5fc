"""A job that does nothing: a 1 KB model that every client sends back as it came."""

import time

import numpy as np

import hanse

app = hanse.ClientApp()


def initial() -> hanse.Model:
    """Return 1 KB of float32."""
    return hanse.Model({"w": np.zeros(256, np.float32)})


@app.train
def train(model: hanse.Model, ctx: hanse.TaskContext) -> hanse.Update:
    """Return the model, and when the task arrived (POSIX seconds)."""
    return hanse.Update(model, 1, {"task_at": time.time()})
