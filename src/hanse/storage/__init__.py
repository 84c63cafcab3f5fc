"""What must outlive a process: the store (jobs, journal, lease, audit) and tensors, models and job packages as files.

Here belong SQL, file formats and the care that makes a write whole or absent. Decisions (who may run what, when a round
is over), the network, and anything that knows of more than one machine do not. ``store``, ``tables`` and ``writer``
alone import SQLAlchemy, ``models`` alone NumPy, so that a process pays only for what it uses: import the modules, not
this package.
"""
