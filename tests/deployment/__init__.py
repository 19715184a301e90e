"""Real SuperLinks and SuperNodes on this machine."""
