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
"""
