"""The authority of a cluster: who is who, who may what, which node has what.

| file | what |
|---|---|
| `core.py`, `presence.py` | links, who is live, time: the master without IO |
| `call.py`, `review.py` | what nodes ask for endpoints; what a new policy takes away |
| `office.py`, `desk.py` | who belongs to the cluster; what the operator asks |
| `effect.py` | what the core wants done |
| `issuer.py` | the cluster's certificates |
| `token.py` | join tokens |
| `policy.py` | who may do what |
| `lease.py` | blocks of unique addresses |
| `registry.py`, `entity.py` | nodes, endpoints, buses, names, matches, leases |
| `ledger.py`, `row.py` | the table that all nodes have, and rows that are the master's own |
| `history.py` | its recent past, by which nodes catch up |
| `feed.py` | how the table reaches all nodes, and who waits for that |
"""
