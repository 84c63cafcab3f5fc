"""A training script as one has it anyway, and the four lines that make it part of a federation, each marked."""

import numpy as np
from sklearn.datasets import load_breast_cancer

import hanse.client as hanse  # 1


def benign(weight, bias, features):
    """Return, for each row of *features*, how likely that tumour is benign."""
    return 1.0 / (1.0 + np.exp(-(features @ weight + bias)))


site = hanse.init().site  # what the settings of this site say about its data; here, which share of one data set it is
features, labels = load_breast_cancer(return_X_y=True)
mine = np.random.default_rng(0).permutation(len(labels))[int(site["partition"]) :: int(site["partitions"])]
features, labels = features[mine], labels[mine]
features = (features - features.mean(axis=0)) / features.std(axis=0)
held = len(labels) // 5

while hanse.is_running():  # 2
    task = hanse.receive()  # 3
    weight, bias = task.model["weight"].copy(), task.model["bias"].copy()
    accuracy = np.mean((benign(weight, bias, features[:held]) > 0.5) == labels[:held])

    for _ in range(int(task.config["local_steps"])):
        error = benign(weight, bias, features[held:]) - labels[held:]
        weight -= task.config["learning_rate"] * features[held:].T @ error / len(error)
        bias -= task.config["learning_rate"] * error.mean()

    metrics = {"accuracy": float(accuracy)}
    hanse.send({"weight": weight, "bias": bias}, num_examples=len(labels) - held, metrics=metrics)  # 4
