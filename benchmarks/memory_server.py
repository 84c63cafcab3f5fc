"""``hanse`` whose server keeps its store in memory: what journalling costs is the difference to the real one."""

import sys
from functools import partial

import hanse.cli.server
from hanse.cli import main
from hanse.server.federated_server import FederatedServer
from hanse.storage.memory import MemoryStore

if __name__ == "__main__":
    hanse.cli.server.FederatedServer = partial(FederatedServer, snapshot_persistor=MemoryStore())  # type: ignore[assignment,misc]
    sys.exit(main())
