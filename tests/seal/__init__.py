from hypothesis import settings

calm = settings(deadline=None)
"""For a busy machine."""
