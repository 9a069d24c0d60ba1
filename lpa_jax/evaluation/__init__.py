"""Trained networks on splits and conditions: predictions, attacks, corruptions."""
