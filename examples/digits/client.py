"""What runs at each site: train on its share, and measure a model on the held-out examples."""

import hanse
from data import held_out, share
from model import measure, train

app = hanse.ClientApp()


@app.train
def train_on_share(model: hanse.Model, ctx: hanse.TaskContext) -> hanse.Update:
    """Return *model* trained for a few passes over this site's share."""
    examples = share(int(ctx.site["partition"]), int(ctx.site["partitions"]))
    trained = train(
        model,
        examples,
        epochs=int(ctx.config["local_epochs"]),
        learning_rate=float(ctx.config["learning_rate"]),
        batch_size=int(ctx.config["batch_size"]),
        rng=ctx.rng(),
    )
    return hanse.Update(trained, num_examples=len(examples), metrics={"train_loss": measure(trained, examples)["loss"]})


@app.evaluate
def evaluate(model: hanse.Model, ctx: hanse.TaskContext) -> hanse.Update:
    """Return how *model* does on the held-out examples; they are the same at every site."""
    del ctx
    examples = held_out()
    return hanse.Update(None, num_examples=len(examples), metrics=measure(model, examples))
