"""MKA: which layers are alike, and how two become one."""
