"""The prefill role: chunked prefill under a token budget, and the push of KV blocks to a decode worker."""
