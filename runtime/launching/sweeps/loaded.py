"""What the server that a sweep's jobs are forked from loads: all that a job needs."""

from cutlayer.runtime.ground.importing import quick_imports

with quick_imports():
    import cutlayer.runtime.launching.sweeps.job_process  # noqa: F401
