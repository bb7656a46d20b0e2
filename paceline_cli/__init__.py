"""The `paceline` command."""

import os

# gRPC reports each connection that ends in good order, in a format of its own; what matters of it the services log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
