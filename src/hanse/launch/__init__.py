"""Processes of jobs: starting them, ending them, and what their logs say.

Here belongs how a job's process comes into being and is reaped (``process``: by exec on this machine; other places
later), behind the two small protocols ``Launcher`` and ``Handle``; how one outlives who started it (``surviving``, with
what ``held`` knows of processes that are not one's own children); whether it ran out of memory (``memory``); and how
large its log may become (``long_logs``). What such a process does, when it is started and what follows from its end are
not decided here.
"""
