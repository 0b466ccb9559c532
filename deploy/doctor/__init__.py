"""``nanogrpo doctor``: what a machine or a cluster lacks, each with its cure."""
