"""Processes of jobs: starting them, ending them, and what their logs say.

Here belongs how a job's process comes into being and is reaped (``process``: by exec on this machine; other places
later), behind the two small protocols ``Launcher`` and ``Handle``. What such a process does, when it is started and
what follows from its end are not decided here.
"""
