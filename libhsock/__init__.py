"""TCP sockets that follow their hosts when addresses change. docs/libhsock.md is the guide."""
