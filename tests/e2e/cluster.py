"""A Ray cluster of one head and simulated nodes on this machine, each with files of its own, until standard input ends.
Run by any interpreter that has ray; prints the dashboard's address.

    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=... python cluster.py PORT 2 1 1
"""

import sys
from contextlib import ExitStack
from tempfile import TemporaryDirectory

from ray.cluster_utils import Cluster

STORE = 100 * 2**20  # bytes of each node's object store


def main(port: int, cpus: list[int]) -> None:
    with ExitStack() as stack:

        def machine() -> dict[str, object]:
            # a socket's path has room for 107 bytes
            folder = stack.enter_context(TemporaryDirectory(prefix="node-", dir="/tmp", ignore_cleanup_errors=True))
            return {"temp_dir": folder, "object_store_memory": STORE}

        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        cluster = Cluster(initialize_head=True, head_node_args={**head, **machine()})
        try:
            for amount in cpus:
                cluster.add_node(num_cpus=amount, **machine())
            cluster.wait_for_nodes()
            print(f"http://127.0.0.1:{port}", flush=True)
            sys.stdin.read()
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(amount) for amount in sys.argv[2:]])
