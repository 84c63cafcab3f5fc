"""What a federation computes: workflows as steps ``state → state``, who takes part in a round, how answers are folded.

Everything here is values in, values out: no clock, no I/O, no process, no message. Randomness and time come from the
``Federation`` that a workflow is handed. What carries tasks to clients belongs to ``hanse.run``, what keeps tensors in
files to ``hanse.storage``, and what a site does with a task to ``hanse.client``.
"""
