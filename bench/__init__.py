"""Figures of afbus beside what else carries bytes, taken in turns in one run: `make bench`.

rows.py         which rows there are, and who is measured in turns for them
target.py       what afbus is to reach, as ratios
ours.py         all ways in which afbus is used
peers/          one file a peer: pipe.py (and AF_UNIX), inet.py (TCP, TLS, UDP), bare_quic.py
                (aioquic), zeromq.py, zenoh.py, iceoryx.py, nats.py, dbus.py
link.py         a link of nodes by itself
match.py        what a message costs among a million masks
idle.py         memory of the agent
wire.py         what a row asks of a system: round trips, one way
meter.py        rates, times and CPU in the window that all ends have in common
stage.py        processes: daemons, and players that begin together
cluster.py      the same on hosts that are network namespaces
certificate.py  for peers that encrypt
run.py          turns; figure.py, table.py, plot.py, machine.py: what is made of them

    python -m bench --row local_rtt_64 --system afbus --system pipe --runs 3

Nothing here decides whether anything is good enough, and no figure fails a build.
"""

import sys
from pathlib import Path

# The hosts that the examples make serve the benches too.
sys.path.append(str(Path(__file__).parent.parent / "examples"))
