"""The daemon's end of the local protocol: a Unix socket, many untrusted clients, one backend.

server      listens, admits clients and counts them    caller        who one of them is, what it may
client      one connection: greeting and requests      requests      one request and its reply
channel     its packets, and those that wait           descriptors   what came beside them
backend     what the daemon does for them              limits        what clients may cost
listener    the socket at a path

Who may: the uid that SO_PEERCRED gives owns its sessions; root and the members of one group
administer all. Nobody can tell another user's session from one that doesn't exist.

What a client can cost is bounded: connections a user, requests under way, packets waiting for a
client that doesn't read, and the time for a greeting or for taking what waits. A client that breaks
the protocol is told so and dropped; other clients notice nothing.
"""

from sessiond.edges.local.backend import Backend as Backend
from sessiond.edges.local.caller import Caller as Caller
from sessiond.edges.local.limits import Limits as Limits
from sessiond.edges.local.server import LocalServer as LocalServer
