"""`tandem bench`: a load on any OpenAI-compatible server, timed at the client; several are compared."""
