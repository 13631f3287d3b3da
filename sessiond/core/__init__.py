"""The pure core: events and the time in, effects out. Standard library only, no I/O, no clock."""
