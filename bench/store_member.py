"""One member of our store with its API on plain HTTP, as etcd's is in the same benchmark; run by `bench.store`.

`python -m bench.store_member FOLDER PORT NAME [NAME=HOST:PORT,…]`: with members, they speak mutual TLS with each other.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from pathlib import Path

from discovery.daemon import Daemon
from discovery.membership import Cluster
from discovery.wire import serve


async def run(folder: Path, port: int, name: str, members: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    daemon = Daemon.make(folder / "state", name, cluster(folder, name, members))
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(daemon.member.run()), tasks.create_task(daemon.leases.run())]
        await daemon.member.wait_ready()
        async with serve.listen_tcp(daemon.application(), "127.0.0.1", port, daemon.front):
            gc.freeze()
            await stop.wait()
        for task in running:
            task.cancel()
    daemon.member.close()


def cluster(folder: Path, name: str, members: str) -> Cluster | None:
    """Return what this member has to know of the others, if there are any; certificates are in the folder above."""
    if not members:
        return None
    addresses = dict(each.split("=") for each in members.split(","))
    return Cluster(addresses[name], addresses, folder.parent / "ca.pem", folder / "tls.pem", folder / "tls.pem")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(message)s")
    asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], (sys.argv[4:] or [""])[0]))
