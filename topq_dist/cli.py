"""The `topq` command."""
