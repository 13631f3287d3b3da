"""sessiond: live TCP sessions that follow their hosts when addresses change."""

__version__ = "0.1.0"
