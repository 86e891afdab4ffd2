"""The child's side: its entry point, the envs it holds, autoreset, and how it serves.

Nothing in here imports `aiovec.pool`.
"""
