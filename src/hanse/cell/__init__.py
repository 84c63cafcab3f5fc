"""The message network: cells that ask and tell each other, and everything that carries bytes between them.

Here belong frames and their encoding, links (gRPC streams or memory), the one listening port, the connector that keeps
a link up, the transfer of tensors by digest, and the process's event loop. This package alone imports protobuf and
gRPC: a servicer method is decode, call, encode. Here belong no decisions: who may do what is a callable that the cell
or the listener is given, and what a message means is its handler's business.

``wire.proto`` is the contract with other processes; its generated code is committed and made again by::

    python -m grpc_tools.protoc -Isrc --python_out=src --mypy_out=src src/hanse/cell/wire.proto
"""

import os

# gRPC's core would write a line of its own to stderr for each handshake that fails and each connection that goes away,
# which whoever can reach the port can cause at will; what matters of it reaches our log as an error's sentence. This is
# read when gRPC is first imported, so it has to be said here.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
