"""Healing: training a shallower model on what the original says."""
