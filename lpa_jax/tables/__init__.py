"""Tables of methods by seeds: their rows, the runs they ask for, and how these compare."""
