"""What the server that a sweep's jobs are forked from loads: all that a job needs."""

from cutlayer.runtime.ground.importing import quick_imports

with quick_imports():
    # A worker of joblib's hands on its own way of starting processes, `loky`, whose name a job has to know.
    import joblib.externals.loky  # noqa: F401

    import cutlayer.runtime.launching.sweeps.job_process  # noqa: F401
