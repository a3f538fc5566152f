"""Make large language models shallower, and prove that they still work.

The map of the package is in CONTRIBUTING.md.
"""

__version__ = "0.1.0"
