"""The status page: what a server tells people about its run, over HTTP, and nothing else."""
