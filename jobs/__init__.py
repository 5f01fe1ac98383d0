"""What a person runs: the `streamdit` command and the entry points of Ray, torchrun and Slurm."""
