"""The server process: gRPC in front, the coordinator behind it."""
