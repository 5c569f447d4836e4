"""The carrier between two members of a cluster.

    identity, certificate, credentials   who is who, and whether a certificate is good
    settings, reason                     sizes and times; why a link ended
    frame, credit, effect                what two ends say, and what a core wants done
    core, inbox, outbox                  one link without IO
    link                                 what the owner of a link holds
    carrier                              what both carriers share
    memory, memory_wire                  a network in memory, on a clock of its own
    quic, wire, udp                      real links: the member's socket, one connection, datagrams
    handshake, transport                 what reaches into aioquic
    dialer                               keeps a link to a member up

An owner makes a `Member` and with it a carrier, gets each link by `Member.accept`, and keeps links
to others up by a `Dialer`. Everything runs in the task of the carrier; nothing blocks.
"""
