"""A run whose clients are on other machines: gRPC streams, one for each client."""

import os

# gRPC prints each failed handshake on stderr otherwise; it reads this when it is first imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
