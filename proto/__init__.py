"""The shared language of afbus: values, codecs, numbers and limits, without any IO.

Nothing here opens a file, knows the time, or imports another folder of afbus. What it imports
from outside is the standard library and msgpack.

    limits.py    every limit, with its reason
    version.py   the version of the door's protocol, and its history
    errors.py    the tree of errors; class, wire code, errno
    text.py      percent escapes
    codec.py     msgpack with limits, and one error for all that is wrong
    address.py   struct sockaddr_bus, and its text form
    siphash.py   the keyed hash
    terms.py     topics and key=value terms, their bits and hashes
    match.py     terms or raw bits, and what happens when a receiver is full
    notice.py    notices of the kernel's address, and gap records
    control.py   control items: numbers and data of every SCM_ and SO_
    frames.py    what client and agent say at the door
    request.py   what our client asks a bus's master, and its answers
    names.py     who owns a name, and who waits for it
    table.py     versioned tables, by snapshot and by deltas
"""
