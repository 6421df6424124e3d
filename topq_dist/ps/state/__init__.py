"""What a run is at one version, and how it comes back after a crash."""
