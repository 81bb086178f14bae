"""Servers that tests bring up for themselves."""
