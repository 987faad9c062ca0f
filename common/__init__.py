"""The leaf package: types, errors and small helpers every part shares; imports no other part, no torch, no ray."""
