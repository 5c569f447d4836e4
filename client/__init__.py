"""What an application imports: the socket of the bus, and asyncio on top of it.

door.py       the connection to the agent that carries control
endpoint.py   one endpoint: door, rings and line, and how it comes back when its agent was lost
ancillary.py  control items, taken apart before sending, fitted after receiving
reception.py  received messages, cut and fitted to the room that the caller has
refusal.py    the words for a message that was refused
socket.py     the socket, shaped like Python's own
"""
