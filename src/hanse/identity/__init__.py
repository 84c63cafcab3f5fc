"""Who someone is, and how they prove it: certificates, the transcript of mutual identification, tokens, startup kits.

Here belong the formats and the mathematics of proof, and the files that hold them. What a proven identity *may do* is
decided in ``coordination.policy``; when a proof is asked for, and what follows from it, belongs to ``server`` and
``client``; sockets belong to ``cell``. The clock is an argument everywhere.
"""
