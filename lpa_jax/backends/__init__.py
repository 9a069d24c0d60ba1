"""How the inner values of a network get names, a file for each library of layers."""
