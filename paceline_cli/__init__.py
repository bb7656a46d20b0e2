"""The `paceline` command."""

import os

# gRPC reports each connection that ends in good order, and each port that is taken, in a format of its own. What
# matters of it comes as an error too, which the commands show and the services log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
