"""Launchers of sweeps on Slurm and on Ray.

Hydra's own plugins for the two end a sweep with the first job that the cluster loses; these wait for every job. They
take the same keys. Nothing of submitit or Ray is imported before a sweep asks for it.
"""
