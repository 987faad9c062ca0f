"""The leaf package: types, errors and small helpers every part shares; imports no other part, no torch, no ray."""

import os

# Read when gRPC is first imported: a stranger's failed handshake is no line on everybody's screen.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
