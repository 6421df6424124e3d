"""The commands of `topq`."""
