"""The composition root: command line, local launch, Ray controller; the only package that may import all others."""
