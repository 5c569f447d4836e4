"""Figures of afbus beside what else carries bytes, taken in turns in one run: `make bench`.

stage.py    processes: an agent, a bus and its master that grants everything, the players of a row
cluster.py  the same over two hosts, which are network namespaces
row.py      what a row is
rows.py     what is measured on one host: one function a row and system
cross.py    what is measured between two hosts, beside plain sockets and a bare aioquic stream
quic.py     that stream
__main__.py runs the rows in turns, prints the table, writes results.json

Nothing here decides whether anything is good enough, and no figure fails a build.
"""

import sys
from pathlib import Path

# The hosts that the examples make serve the benches too.
sys.path.append(str(Path(__file__).parent.parent / "examples"))
