"""Files that are compared whole. They are written anew by `make golden`, and by nothing else."""
