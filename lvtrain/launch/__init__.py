"""The chain of Slurm jobs around a run: what is submitted, what happens after each attempt, and where it stands."""
