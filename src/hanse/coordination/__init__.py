"""Decisions about who takes part, who may do what, and what runs where.

Here belongs whatever the server decides and can decide from values alone: who is registered and alive (``registry``),
who is in the middle of registering (``admission``), whether this server serves now (``service``), which job starts with
whom (``schedule``), who runs what and whose answer counts (``runs``), by which key a task's answer is found again
(``task_keys``), who may do what (``policy``). Time is an
argument: ``now`` in seconds of a monotonic clock, ``now_s`` in POSIX seconds. Nothing here reads a clock, draws a
random number, waits, sends, stores or verifies a signature; the packages above do that and ask here what to do.

None of these objects is shared between threads: one owner, the server's event loop, calls them.
"""
