"""What an application imports: the socket of the bus, and asyncio on top of it.

door.py       the connection to the agent that carries control
endpoint.py   one endpoint: door, rings and line, and how it comes back when the agent was lost
ancillary.py  what stands beside a message that is sent
socket.py     the socket, shaped like Python's own
"""
