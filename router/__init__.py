"""The OpenAI API over HTTP, the choice of workers and the life of a request; never imports torch."""
