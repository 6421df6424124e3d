"""The numbers of a server: pushes in, one step of the inner optimizer, an update out."""
