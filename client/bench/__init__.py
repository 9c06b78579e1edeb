"""Load generator: a workload (workload.py) sent to a running server (targets.py) by the clock (load.py), measured (summary.py)
and written down (report.py). `turbotriton bench` is its command line."""
