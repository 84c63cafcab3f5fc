"""A run: one job's workflow being driven, in a process of its own beside the server (or inside the simulator).

Here belong the workflow's handle on its clients (``federation``), the loop that drives and resumes it (``runner``), its
link to the server that journals for it (``server_link``), and the loading of a job's code (``loading``). No algorithm,
no database and no key belongs here: what a run decides goes to its server, which alone writes.
"""
