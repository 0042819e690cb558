"""Train LLM agents that answer right with the fewest tool calls."""

__version__ = "0.1.0"  # the one place: setup.py reads it, and a tag v0.1.0 is made of it
