"""Runs programs nobody has read: `pool` keeps warmed interpreters, `inside/` is what runs in each."""
