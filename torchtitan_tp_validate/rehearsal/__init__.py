"""Opt-in: prove on a few ranks that a run starts, and trains what one process would train."""
