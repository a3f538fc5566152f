"""Reports for people (terminal) and machines (JSON)."""
