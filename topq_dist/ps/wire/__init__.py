"""Protocol types to and from gRPC's messages, in memory that is used again."""
