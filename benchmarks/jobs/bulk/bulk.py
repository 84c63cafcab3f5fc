"""A job that moves bytes: 100 MB of float32 noise in 10 tensors, changed by every client in every round."""

import numpy as np

import hanse

app = hanse.ClientApp()

TENSORS = 10
ELEMENTS = 2_500_000


def initial(seed: int) -> hanse.Model:
    """Return 10 tensors of 10 MB."""
    rng = np.random.default_rng(seed)
    return hanse.Model({f"t{i}": rng.standard_normal(ELEMENTS, np.float32) for i in range(TENSORS)})


@app.train
def train(model: hanse.Model, ctx: hanse.TaskContext) -> hanse.Update:
    """Return every tensor changed."""
    step = np.float32(1 + int(ctx.client.rpartition("-")[2]) / 100)
    return hanse.Update(hanse.Model({name: array * step for name, array in model.items()}), 1)
