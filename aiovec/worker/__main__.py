"""``python -m aiovec.worker``: a worker process that is a fresh interpreter. Started by `aiovec.pool.process`."""

from aiovec.worker.entry import run_interpreter

if __name__ == "__main__":
    run_interpreter()
