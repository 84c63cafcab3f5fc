"""What must outlive a process: the store (jobs, journal, lease, audit), and tensors, models and job packages as files.

Here belong SQL, file formats, objects in buckets, and the care that makes a write whole or absent. Decisions (who may
run what, when a round is over), the network, and anything that knows of more than one machine do not. ``store`` and
what it imports know SQLAlchemy, ``migrations`` Alembic, ``postgres`` psycopg, ``bucket`` obstore and ``models`` NumPy,
and nothing else does, so that a process pays only for what it uses: import the modules, not this package.
"""
