"""One model on one device (or one tensor-parallel group); knows token ids only, no HTTP, gRPC, Ray or peers."""
