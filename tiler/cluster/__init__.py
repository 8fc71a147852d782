"""Share one canvas among several processes or machines, each under its own memory ceiling, with dask.distributed.

This process keeps the canvas, the schedule and the job. Workers (`tiler worker`) have the weights on their own disks,
receive tiles and return guided predictions; they hold nothing that cannot be lost. No other package of tiler imports
dask.
"""
