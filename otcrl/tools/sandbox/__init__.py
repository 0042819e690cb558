"""Runs programs nobody has read: `pool` keeps warmed interpreters, `worker` is the program inside each."""
