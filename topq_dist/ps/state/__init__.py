"""The state of a run at one version, and how it comes back after a crash."""
