"""Parity: how an artifact compares with what it was made from, measured in its runtime."""
