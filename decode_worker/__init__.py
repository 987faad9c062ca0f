"""The decode role: reservations for landing KV blocks, and continuous batching of everything that runs."""
