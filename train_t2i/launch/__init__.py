"""``scripts/multi_node/multi.sh``: one training script on several machines over SSH.  The standard library alone.

Each node's part runs under a supervisor that ends with the connection (supervisor.py), the master's as well.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from train_t2i.errors import EXIT_DONE
from train_t2i.launch import command, nodes, outcome, preflight, watch


def main(arguments: Sequence[str]) -> int:
    launch = nodes.read(arguments, os.environ)
    if launch.dry_run:
        for node in launch.nodes:
            line = f"{node.host}: {command.node_command(launch, node.rank)}\n"
            sys.stdout.buffer.write(os.fsencode(line))
        sys.stdout.flush()
        return EXIT_DONE
    try:
        marker = outcome.Marker(preflight.check(launch))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    with watch.Signals() as signals:
        members = watch.start(launch)
        watch.tell(f"{len(members)} nodes; logs in {launch.log_dir}")
        seen = watch.Watch(members, launch.save_grace_s, signals)
        seen.run()
    code = outcome.exit_code(members, seen.failed, signals.last, marker.code())
    for member in seen.failed:
        watch.tell(f"{member.how} (see {member.log})")
    watch.tell(f"ended with code {code}")
    return code
