"""Jobs for the tests: folders with the code that a test needs."""

from pathlib import Path
from textwrap import dedent

MODEL = """
    import numpy as np
    from hanse import Model

    def initial(seed):
        rng = np.random.default_rng(seed)
        return Model({"big": rng.standard_normal((100, 60)).astype(np.float32), "small": rng.standard_normal(5)})
"""
"""One tensor is a file (24 KB), the other rides along."""

CLIENT = """
    import hanse
    from model import initial

    app = hanse.ClientApp()

    @app.train
    def train(model, ctx):
        rng, part = ctx.rng(), ctx.site["partition"]
        noise = {name: rng.standard_normal(array.shape).astype(array.dtype) for name, array in model.items()}
        moved = {name: array * 0.9 + noise[name] * (part + 1) for name, array in model.items()}
        return hanse.Update(hanse.Model(moved), num_examples=part + 1, metrics={"norm": float(abs(moved["big"]).sum())})

    @app.evaluate
    def evaluate(model, ctx):
        return hanse.Update(None, num_examples=ctx.site["partition"] + 1, metrics={"sum": float(model["big"].sum())})
"""

SCRIPT = """
    import hanse.client as hanse

    site = hanse.init()
    seen = 0
    print("hello from", site.name)
    while hanse.is_running():
        task = hanse.receive()
        seen += 1
        rng, part = task.rng(), site.site["partition"]
        moved = {name: array + rng.standard_normal(array.shape).astype(array.dtype) * part
                 for name, array in task.model.items()}
        hanse.log({"seen": seen}, step=seen)
        hanse.send(moved, num_examples=part + 1, metrics={"seen": seen})
    print("goodbye from", site.name)
"""


PACED = """
    import os
    import hanse

    app = hanse.ClientApp()

    def meet(gate, flags):
        os.close(os.open(gate, flags))  # waits for who opens the other end

    @app.train
    def train(model, ctx):
        first, second = ctx.config["first_gate"], ctx.config["second_gate"]
        if ctx.client == "site-2":
            if ctx.round == 1:
                meet(first, os.O_RDONLY)
            else:
                meet(second, os.O_WRONLY)
        elif ctx.round == 3:
            meet(first, os.O_WRONLY)
            meet(second, os.O_RDONLY)
        return hanse.Update(hanse.Model({name: array + 1 for name, array in model.items()}), num_examples=1)
"""
"""The second client answers its first task when the first one is at its third, and that one when the second is at its
second."""


def write_job(folder: Path, *, client: str = CLIENT, rounds: int = 3, **files: str) -> Path:
    """Return *folder* with a job in it; *files* are further modules, by name, or stand in for those of the job."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = {"client": client, "model": MODEL, **files}
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(dedent(source), encoding="utf-8")
    write_definition(folder, rounds=rounds)
    return folder


def write_definition(
    folder: Path, *, rounds: int = 3, client: str = "client:app", workflow: str = "fedavg", more: str = ""
) -> None:
    settings = f'name = "{workflow}"\nrounds = {rounds}\n{more}'
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "toy"\n[tool.hanse]\nclient = "{client}"\nmodel = "model:initial"\nseed = 3\n'
        f"[tool.hanse.workflow]\n{settings}",
        encoding="utf-8",
    )


def write_script_job(folder: Path, script: str = SCRIPT, *, rounds: int = 3) -> Path:
    write_job(folder, client=script)
    (folder / "client.py").rename(folder / "train.py")
    write_definition(folder, rounds=rounds, client="train.py")
    return folder
