"""A Ray cluster of several nodes on this machine, in a process of its own: `python ray_cluster.py NODES STORE_MB`.

It prints the address, then does what each line of stdin says ("kill" the raylet of the newest node, "add" one), and
takes everything with it when stdin closes. Tests fork, which a process that speaks to Ray must not.
"""

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
if __name__ == "__main__":
    from ray.cluster_utils import Cluster

    nodes, megabytes = int(sys.argv[1]), int(sys.argv[2])
    options = {"num_cpus": 1, "object_store_memory": megabytes * 1_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 2 if nodes == 1 else 1})
    more = [cluster.add_node(num_cpus=1, object_store_memory=megabytes * 1_000_000) for _ in range(nodes - 1)]
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            more.pop().kill_raylet()
            print("killed", flush=True)
        elif line.strip() == "add":
            more.append(cluster.add_node(num_cpus=1, object_store_memory=megabytes * 1_000_000))
            print("added", flush=True)
    cluster.shutdown()
