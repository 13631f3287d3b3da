"""The seal on what two daemons say: keys, trust and sealed datagrams, without a clock or sockets.

noise         the cryptography of the handshake (Noise XX)
datagram      what is on the wire, and why it is refused
handshake     three datagrams from strangers to an association
cookie        proof that a source receives what is sent to it
transport     sealed datagrams under the keys of an association
meeting       a handshake that this host begins, and what waits for it
associations  all of a host's: datagrams and time in, datagrams and opened payloads out
identity      this host's key, and how a key is written
trust         whether a key may be this peer's
known_peers   the keys met before, in a file
private_file  files for one reader, written whole or not at all
"""
