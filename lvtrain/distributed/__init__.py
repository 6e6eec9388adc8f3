"""Ranks: which one this process is, and how they communicate."""
