"""Ranks: who this process is among them, and what they say to each other."""
