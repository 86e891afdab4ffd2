"""What both sides share: frames, pickles, the layout of spaces, the shared slab, infos, failures.

Nothing in here imports `aiovec.pool` or `aiovec.worker`, or asyncio.
"""
