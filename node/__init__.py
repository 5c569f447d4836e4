"""The agent of one host: it plays the part that the mail gives to the kernel.

    agent.py       puts everything together, from start to end; what the CLI runs
    config.py      the file of settings, and the place of the door
    door.py        the socket at which clients arrive, and their connections
    process.py     what the kernel says of a process
    journal.py     what must survive the agent
    core.py        the decisions, without IO: connections, endpoints, timers; whose a call is
    attachment.py  how an endpoint comes onto a bus, or becomes its master
    control.py     messages with control items, from a bus's master
    grant.py       what a master may grant and revoke
    unread.py      what clients took from their rings and nobody will read
    option.py      options, and the state that an endpoint can read
    listing.py     the rows that people see; elsewhere.py: those of other nodes
    registry.py    endpoints and buses; keeps tables, switch and journal the same
    endpoint.py    the records of the registry
    unique.py      unique addresses: those that were granted, and the next one
    effect.py      what the core wants done
    port.py        what the core needs of the switch

On several hosts (QUIC and certificates are imported by `links.py` and `membership.py` alone, and
these only where a host is a node of a cluster):

    links.py       the shell: one socket for the master and for all other nodes
    membership.py  the folder that makes this host a node: key, certificate, whom it trusts
    place.py       places where members of a cluster are, as text
    uplink.py      the control link to the cluster's master, without IO
    call.py        calls to the master: queued, on the link, awaited
    answer.py      what the values of the master's results say
    claim.py       what this node's endpoints have by the master, to state it again
    lease.py       blocks of unique addresses
    verdict.py     what the master has said that endpoints may do
    uplink_effect.py  what the uplink wants done
    peers.py       links to other nodes, and the lanes over them
    relay.py       links by way of the master, where no place of a node answers
    relayed_bodies.py  large bodies on these
    bodies.py      large bodies, by content
    federation.py  buses that other nodes are on, too
    steps.py       calls of clients that take several steps

Messages do not come through here: the switch, `afbus._datapath.Switch`, moves them on its thread.
"""
