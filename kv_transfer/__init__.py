"""Moves KV blocks between two processes; knows nothing of scheduling or models."""
