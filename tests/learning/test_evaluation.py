import msgspec
import pytest

from hanse.errors import TooFewClients
from hanse.learning.evaluation import Evaluation
from hanse.learning.local import LocalFederation
from hanse.learning.workflow import Task
from hanse.model import Update

from .clients import failing, model, name, returning


async def test_clients_measure_and_nobody_changes_the_model() -> None:
    tasks: list[Task] = []

    def measuring(task: Task) -> Update:
        tasks.append(task)
        return Update(None, 3, {"accuracy": 0.5})

    federation = LocalFederation({name(1): measuring, name(2): returning(Update(None, 1, {"accuracy": 0.9}))})
    states = [state async for state in federation.states(Evaluation(config={"split": "test"}), model(7.0))]
    assert len(states) == 2
    assert states[1].model is states[0].model
    assert states[1].done
    assert states[1].metrics == {"accuracy": pytest.approx(0.6), "clients": 2.0, "num_examples": 4.0}
    assert states[1].values["clients"] == {
        "site-1": {"accuracy": 0.5, "num_examples": 3},
        "site-2": {"accuracy": 0.9, "num_examples": 1},
    }
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(states[1].values)) == states[1].values
    assert [(task.name, task.expects_model, task.config) for task in tasks] == [("evaluate", False, {"split": "test"})]


async def test_evaluation_takes_part_as_declared() -> None:
    federation = LocalFederation({name(1): failing, name(2): returning(Update(None, 1))})
    assert (await federation.run(Evaluation(), model(0.0))).metrics["clients"] == 1.0
    with pytest.raises(TooFewClients):
        await federation.run(Evaluation(min_clients=2), model(0.0))
