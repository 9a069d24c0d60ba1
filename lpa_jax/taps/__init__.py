"""How the inner values of a network are captured and replaced, a file for each library."""
