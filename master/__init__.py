"""The authority of a cluster: who is who, who may what, which node has what.

| file | what |
|---|---|
| `core.py`, `presence.py` | links, who is live, time: the master without IO |
| `call.py`, `review.py` | what nodes ask for their endpoints; what a new policy takes away |
| `office.py`, `desk.py` | who belongs to the cluster; what the operator asks |
| `effect.py` | what the core wants done |
| `issuer.py`, `token.py` | the cluster's certificates; join tokens |
| `policy.py` | who may do what |
| `registry.py`, `entity.py`, `lease.py` | nodes, endpoints, buses, names, matches, leases |
| `ledger.py`, `row.py` | the table that all nodes have, and rows that are the master's own |
| `feed.py`, `history.py` | how the table reaches all nodes, and who waits for that |
| `server.py` | effects and links, on any carrier |
| `service.py` | the process: state, journal, signals |
| `journal.py`, `directory.py`, `door.py` | what survives; keys and files; where the operator asks |
"""
