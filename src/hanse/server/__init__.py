"""The server: the two classes of the public contract, and what they are composed of.

Here are lifetimes: a listening server (``federated_server``), the jobs it runs (``jobs``) and each of those while it
runs (``active_run``) with its journal (``run_journal``) and its processes: its clients' (``client_processes``) and its
own, from outside (``run_process``) and from within (``job_process``, ``run_manager``). Then mutual identification
(``identification``) and who is primary (``overseer``). Decisions are in ``hanse.coordination``, algorithms in
``hanse.learning``; SQL, certificates and the network are behind their adapters.
"""

from hanse.server.federated_server import BaseServer, FederatedServer

__all__ = ["BaseServer", "FederatedServer"]
