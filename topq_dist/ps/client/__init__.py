"""The worker: a torch optimizer whose inner optimizer runs in parameter servers."""
