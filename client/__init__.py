"""What an application imports: the socket of the bus, and asyncio on top of it.

door.py       the connection to the agent that carries control
endpoint.py   one endpoint: door, rings and line, and how it comes back when its agent was lost
absent_rings.py  what stands in place of its rings while it has none
ancillary.py  control items, taken apart before sending, fitted after receiving
reception.py  received messages, cut and fitted to the room that the caller has
refusal.py    the words for a message that was refused
words.py      addresses, terms and requests as they stand in a sentence
sending.py    the half of a socket that sends
receiving.py  the half that receives
socket.py     the socket, shaped like Python's own

In an event loop, on top of it:

message.py    what a member receives, as one value
backlog.py    what has arrived and is not read yet, with an account of what found no room
stream.py     what arrives one by one, and waits with a deadline
unread.py     what nobody will read, and whose senders are told
outbox.py     sends, at once or when there is room
open_request.py  requests that are not answered yet
service.py    answers requests as they come
mailbox.py    one endpoint in an event loop: its life, and what arrives, sorted
subscription.py  one subscription of a member, and its feed
member.py     a member of a bus
authority.py  what a bus's master decides, without any IO
question.py   what it asks the application's policy
docket.py     requests that it has not answered yet
record.py     what it knows of its members
effect.py     what it wants done
bus.py        a bus and its master, around the authority
"""
