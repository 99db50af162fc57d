"""What the server that a sweep's jobs are forked from loads: all that a job needs."""

from importlib import import_module

from cutlayer.runtime.ground.importing import quick_imports

# A worker of joblib's hands on its own way of starting processes, whose name, `loky`, a job has to know.
NEEDED = ("joblib.externals.loky", "cutlayer.runtime.launching.sweeps.job_process")

with quick_imports():
    for _name in NEEDED:
        import_module(_name)
