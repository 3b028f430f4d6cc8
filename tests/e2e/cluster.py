"""A Ray cluster of one head and simulated nodes on this machine, each with files of its own, until standard input ends.
Run by any interpreter that has ray; prints the dashboard's address.

    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=... python cluster.py PORT 2 1 1
"""

import os
import sys
from contextlib import ExitStack
from tempfile import TemporaryDirectory

from ray.cluster_utils import Cluster

# bytes of each node's object store; Ray's fixed port of the agent may be another cluster's
NODE = {"object_store_memory": 100 * 2**20, "dashboard_agent_listen_port": 0}
HEAD = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1"}


def main(port: int, cpus: list[int]) -> None:
    with ExitStack() as stack:

        def folder() -> str:
            # a socket's path has room for 107 bytes
            return stack.enter_context(TemporaryDirectory(prefix="node-", dir="/tmp", ignore_cleanup_errors=True))

        os.environ["RAY_TMPDIR"] = folder()  # of the head, whose jobs then find it beside other clusters
        cluster = Cluster(initialize_head=True, head_node_args={**HEAD, **NODE, "dashboard_port": port})
        try:
            for amount in cpus:
                cluster.add_node(num_cpus=amount, temp_dir=folder(), **NODE)
            cluster.wait_for_nodes()
            print(f"http://127.0.0.1:{port}", flush=True)
            sys.stdin.read()
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(amount) for amount in sys.argv[2:]])
