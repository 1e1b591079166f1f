"""Hooks: how a loaded program gets to the place where it runs, one file for each way."""
