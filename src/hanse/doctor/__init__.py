"""What ``hanse doctor`` looks at: whether a kit would work here, before any job needs it.

Here belong the checks. Facts are gathered by ``probes`` and by what reads a kit's files; each check is a function from
facts to a ``Finding``, with the time as an argument; ``checkup`` puts them in order, so that what depends on a failed
check is skipped. Nothing here changes anything: nothing is registered, made or written, here or at the server.
"""
